"""Writing a FlexMerge checkpoint: docs/flexmerge-format.md. One block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Masked
from mergekit_ext.flexmerge.finite import require_in_range
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.links import link_model
from mergekit_ext.flexmerge.manifest import (
    BASE,
    DENSE,
    FILE_NAME,
    MASKED,
    MASKS,
    UNIFIED,
    Block,
    Group,
    Manifest,
    Private,
    Task,
    TensorInfo,
)
from mergekit_ext.flexmerge.plan import Plan, StoredGroup
from mergekit_ext.flexmerge.private import stored_private
from mergekit_ext.flexmerge.shards import Entry, Key, ShardWriter
from mergekit_ext.flexmerge.source import BlockData, BlockReader

# Below this share of a dtype's largest value no rounding leads out of its range.
_SAFE_RANGE = 0.9


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


@dataclass(frozen=True)
class Provenance:
    """What the manifest says of where a checkpoint comes from."""

    generator: str
    method: Mapping[str, Any]
    base_model: str
    models: Sequence[str]


def write_checkpoint(
    folder: Path,
    reader: BlockReader,
    order: Order,
    provenance: Provenance,
    merged: Callable[[BlockLayout, Sequence[StoredGroup]], None] = lambda block, groups: None,
) -> Manifest:
    """Write shards, task folders with their links and indexes, and the manifest.

    Args:
        folder: exists and is empty; nothing of it counts before this function has returned.
        reader: reads the blocks of the base and the models.
        order: what to write.
        provenance: for the manifest.
        merged: told of each block that is done.

    Raises:
        MergeError: a merged tensor is not finite in its dtype.
        NonFiniteError: a private tensor holds NaN or infinity.
        OSError: a file cannot be read or written.
    """
    layout = reader.layout
    shards = ShardWriter(folder, _declared(layout, order), order.shard_size)
    try:
        rescale = {}
        for block, groups in zip(layout.blocks, order.plan.groups, strict=True):
            rescale[block.name] = _write_block(block, groups, reader, order, shards)
            merged(block, groups)
        for task, headers in enumerate(layout.private):
            for header in headers:
                key = (DENSE, (layout.tasks[task],))
                shards.write(key, header.name, stored_private(reader, task, header))
        files = shards.finish()
    finally:
        shards.close()
    ordinary = _link(folder, layout, order.plan, shards)
    manifest = Manifest(
        generator=provenance.generator,
        method=provenance.method,
        base_model=provenance.base_model,
        size=order.plan.size,
        tasks=tuple(
            Task(name, model, name in ordinary)
            for name, model in zip(layout.tasks, provenance.models, strict=True)
        ),
        files=files,
        blocks=tuple(
            _block_entry(layout, block, groups, rescale[block.name])
            for block, groups in zip(layout.blocks, order.plan.groups, strict=True)
        ),
        private=tuple(
            Private(name, tuple(TensorInfo(h.name, tuple(h.shape)) for h in headers))
            for name, headers in zip(layout.tasks, layout.private, strict=True)
            if headers
        ),
    )
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _names(layout: Layout, group: StoredGroup) -> tuple[str, ...]:
    return tuple(layout.tasks[task] for task in group.tasks)


def _declared(layout: Layout, order: Order) -> dict[Key, list[Entry]]:
    found: dict[Key, list[Entry]] = {}

    def add(kind: str, tasks: tuple[str, ...], entry: Entry) -> None:
        found.setdefault((kind, tasks), []).append(entry)

    for block, groups in zip(layout.blocks, order.plan.groups, strict=True):
        if any(group.kind == MASKED for group in groups):
            for part in block.parts:
                add(BASE, layout.tasks, Entry.of(part.name, part.base_dtype, part.shape))
        for group in groups:
            kind = UNIFIED if group.kind == MASKED else DENSE
            names = _names(layout, group)
            for part in block.parts:
                dtype = order.forced or part.dtype(group.tasks)
                add(kind, names, Entry.of(part.name, dtype, part.shape))
            for name in names if group.kind == MASKED else ():
                size = -(-block.size // 8)
                add(MASKS, (name,), Entry.of(block.name, torch.uint8, (size,)))
    for task, headers in zip(layout.tasks, layout.private, strict=True):
        for header in headers:
            add(DENSE, (task,), Entry(header.name, header.dtype, header.shape, header.nbytes))
    return found


def _write_block(
    block: BlockLayout,
    groups: Sequence[StoredGroup],
    reader: BlockReader,
    order: Order,
    shards: ShardWriter,
) -> dict[int, float]:
    layout = reader.layout
    shared = [task for group in groups if len(group.tasks) > 1 for task in group.tasks]
    data = reader.read(block, shared) if shared else None
    rescale: dict[int, float] = {}
    if data is not None and any(group.kind == MASKED for group in groups):
        for index, part in enumerate(block.parts):
            tensor = data.part(data.base, index).to(part.base_dtype)
            shards.write((BASE, layout.tasks), part.name, tensor)
    for group in groups:
        names = _names(layout, group)
        if len(group.tasks) == 1:
            _copy(block, group.tasks[0], reader, order, shards)
            continue
        assert data is not None
        dtype = order.forced or block.dtype(group.tasks)
        if group.kind == DENSE:
            vector = order.algorithm.merge(data, group.tasks, dtype, order.cuts)
            _write_vector((DENSE, names), block, vector, group, order, shards)
            continue
        found = order.algorithm.merge_masked(data, group.tasks, dtype, order.cuts)
        _require_reconstructible(block, group, found, data, order)
        _write_vector((UNIFIED, names), block, found.unified, group, order, shards)
        for task in group.tasks:
            shards.write((MASKS, (layout.tasks[task],)), block.name, found.masks[task])
        rescale.update(found.rescale)
    return rescale


def _copy(
    block: BlockLayout, task: int, reader: BlockReader, order: Order, shards: ShardWriter
) -> None:
    """One task's own tensors: their very bytes, unless another dtype is asked for."""
    for part in block.parts:
        stored = reader.read_stored(task, part.name)
        dtype = part.dtypes[task]
        if order.forced is not None and order.forced != dtype:
            stored = stored.view(dtype).to(order.forced)
            require_in_range(stored, part.name)
        shards.write((DENSE, (reader.layout.tasks[task],)), part.name, stored)


def _write_vector(
    key: Key,
    block: BlockLayout,
    vector: Tensor,
    group: StoredGroup,
    order: Order,
    shards: ShardWriter,
) -> None:
    for part in block.parts:
        tensor = vector[part.slice].to(order.forced or part.dtype(group.tasks))
        require_in_range(tensor, part.name)
        shards.write(key, part.name, tensor)


def _require_reconstructible(
    block: BlockLayout, group: StoredGroup, found: Masked, data: BlockData, order: Order
) -> None:
    """The weights that readers will make of a masked group must be finite too."""
    for index, part in enumerate(block.parts):
        if not math.prod(part.shape):
            continue
        dtype = order.forced or part.dtype(group.tasks)
        base = data.part(data.base, index).abs().max()
        step = found.unified[part.slice].abs().max()
        most = float(base) + max(found.rescale.values()) * float(step)
        if most < _SAFE_RANGE * torch.finfo(dtype).max:
            continue
        for task in group.tasks:
            made = found.vector(data.base, task)[part.slice].to(dtype)
            require_in_range(made, part.name)


def _block_entry(
    layout: Layout, block: BlockLayout, groups: Sequence[StoredGroup], rescale: Mapping[int, float]
) -> Block:
    return Block(
        block.name,
        block.kind,
        tuple(TensorInfo(part.name, part.shape) for part in block.parts),
        tuple(
            Group(
                _names(layout, group),
                group.kind,
                group.similarity,
                {layout.tasks[task]: rescale[task] for task in group.tasks}
                if group.kind == MASKED
                else {},
            )
            for group in groups
        ),
    )


def _link(folder: Path, layout: Layout, plan: Plan, shards: ShardWriter) -> set[str]:
    """Make the task folders; return the tasks that are ordinary checkpoints."""
    masked = {
        layout.tasks[task]
        for groups in plan.groups
        for group in groups
        if group.kind == MASKED
        for task in group.tasks
    }
    sets = {_names(layout, group) for groups in plan.groups for group in groups}
    sets |= {(name,) for name in layout.tasks}
    ordinary = set()
    for name in layout.tasks:
        home = folder / name
        home.mkdir()
        if name in masked:
            continue
        ordinary.add(name)
        keys: list[Key] = [(DENSE, names) for names in sorted(sets) if name in names]
        link_model(folder, home, [file for key in keys for file in shards.where(key)])
    whole = all(len(groups) == 1 and groups[0].kind == DENSE for groups in plan.groups)
    if whole and not any(layout.private):
        link_model(folder, folder, list(shards.where((DENSE, layout.tasks))))
    return ordinary
