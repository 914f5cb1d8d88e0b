"""What a checkpoint stores, tensor by tensor: docs/flexmerge-format.md, "Shards"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.manifest import BASE, DENSE, MASKED, MASKS, UNIFIED, FileKind
from mergekit_ext.flexmerge.plan import Plan, StoredGroup
from mergekit_ext.io.planned import Entry

Key = tuple[FileKind, tuple[str, ...]]  # kind of file, set of tasks


@dataclass(frozen=True)
class Order:
    """What is to be written.

    Attributes:
        plan: who shares what.
        algorithm: how the members of a group are merged.
        cuts: what trimming keeps of each model.
        forced: the dtype of all shareable tensors, if it is not that of the inputs.
        shard_size: the largest size of a file in bytes; 0 for one file a set of tasks.
    """

    plan: Plan
    algorithm: Algorithm
    cuts: Cuts | None = None
    forced: torch.dtype | None = None
    shard_size: int = 0


def names_of(layout: Layout, group: StoredGroup) -> tuple[str, ...]:
    """The names of a group's tasks."""
    return tuple(layout.tasks[task] for task in group.tasks)


def block_entries(
    layout: Layout,
    block: BlockLayout,
    groups: Sequence[StoredGroup],
    forced: torch.dtype | None,
) -> Iterator[tuple[Key, Entry]]:
    """The tensors stored for one block, in the order in which they are written."""
    if any(group.kind == MASKED for group in groups):
        for part in block.parts:
            yield (BASE, layout.tasks), Entry.of(part.name, part.base_dtype, part.shape)
    for group in groups:
        masked = group.kind == MASKED
        names = names_of(layout, group)
        for part in block.parts:
            dtype = forced or part.dtype(group.tasks)
            entry = Entry.of(part.name, dtype, part.shape)
            yield (UNIFIED if masked else DENSE, names), entry
        for name in names if masked else ():
            size = -(-block.size // 8)
            yield (MASKS, (name,)), Entry.of(block.name, torch.uint8, (size,))


def private_entries(layout: Layout, task: int) -> Iterator[tuple[Key, Entry]]:
    """The private tensors of one task."""
    for header in layout.private[task]:
        entry = Entry(header.name, header.dtype, tuple(header.shape), header.nbytes)
        yield (DENSE, (layout.tasks[task],)), entry


def declared(layout: Layout, order: Order) -> dict[Key, list[Entry]]:
    """Everything that is stored, by kind and set of tasks, in order."""
    found: dict[Key, list[Entry]] = {}
    for block, groups in zip(layout.blocks, order.plan.groups, strict=True):
        for key, entry in block_entries(layout, block, groups, order.forced):
            found.setdefault(key, []).append(entry)
    for task in range(len(layout.tasks)):
        for key, entry in private_entries(layout, task):
            found.setdefault(key, []).append(entry)
    return found
