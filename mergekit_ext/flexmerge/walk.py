"""The models of a FlexMerge in memory, at one size after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Masked
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.manifest import MASKED
from mergekit_ext.flexmerge.plan import Plan, StoredGroup
from mergekit_ext.flexmerge.source import BlockReader


@dataclass(frozen=True)
class _Dense:
    """A group's tensors, which its tasks share."""

    tensors: Mapping[str, Tensor]

    def of(self, task: int) -> Mapping[str, Tensor]:
        return self.tensors


@dataclass(frozen=True)
class _Reconstructed:
    """A masked group; each task's tensors are made when they are asked for."""

    block: BlockLayout
    base: Tensor
    masked: Masked
    group: StoredGroup
    forced: torch.dtype | None

    def of(self, task: int) -> Mapping[str, Tensor]:
        vector = self.masked.vector(self.base, task)
        return _split(self.block, vector, self.group.tasks, self.forced)


_Stored: TypeAlias = "_Dense | _Reconstructed"


class Walk:
    """Goes from size to size, merging only what changed; a merged tensor is one for its group.

    Args:
        reader: reads the blocks.
        algorithm: merges the members of a group.
        cuts: what trimming keeps of each model.
        forced: the dtype of all shareable tensors, if it is not that of the inputs.
    """

    def __init__(
        self,
        reader: BlockReader,
        algorithm: Algorithm,
        cuts: Cuts | None = None,
        forced: torch.dtype | None = None,
    ):
        self._reader, self._algorithm = reader, algorithm
        self._cuts, self._forced = cuts, forced
        self._now: list[dict[StoredGroup, _Stored]] = [{} for _ in reader.layout.blocks]
        self._private = [
            {header.name: reader.tensor(task, header.name) for header in headers}
            for task, headers in enumerate(reader.layout.private)
        ]

    def go(self, plan: Plan) -> int:
        """Change to the groups of `plan`; return how many blocks had to be touched."""
        changed = 0
        for index, (block, groups) in enumerate(
            zip(self._reader.layout.blocks, plan.groups, strict=True)
        ):
            before = self._now[index]
            wanted = [_key(group) for group in groups]
            if set(wanted) == set(before):
                continue
            changed += 1
            self._now[index] = {
                key: before[key] if key in before else self._make(block, key) for key in wanted
            }
        return changed

    def tensors(self, task: int) -> dict[str, Tensor]:
        """Every tensor of one task at the present size; on the CPU, not to be written to."""
        found = dict(self._private[task])
        for groups in self._now:
            stored = next(made for group, made in groups.items() if task in group.tasks)
            found.update(stored.of(task))
        return found

    def _make(self, block: BlockLayout, group: StoredGroup) -> _Stored:
        if len(group.tasks) == 1:
            return _Dense(dict(self._own(block, group.tasks[0])))
        data = self._reader.read(block, group.tasks)
        dtype = self._forced or block.dtype(group.tasks)
        if group.kind == MASKED:
            found = self._algorithm.merge_masked(data, group.tasks, dtype, self._cuts)
            # The reader's memory is used again.
            return _Reconstructed(block, data.base.clone(), found, group, self._forced)
        vector = self._algorithm.merge(data, group.tasks, dtype, self._cuts)
        return _Dense(_split(block, vector, group.tasks, self._forced))

    def _own(self, block: BlockLayout, task: int) -> Iterator[tuple[str, Tensor]]:
        for part in block.parts:
            tensor = self._reader.tensor(task, part.name)
            yield part.name, tensor if self._forced is None else tensor.to(self._forced)


def _key(group: StoredGroup) -> StoredGroup:
    """A group without its similarity, which does not change what is stored."""
    return StoredGroup(group.tasks, group.kind)


def _split(
    block: BlockLayout, vector: Tensor, tasks: Sequence[int], forced: torch.dtype | None
) -> dict[str, Tensor]:
    return {
        part.name: vector[part.slice].view(part.shape).to("cpu", forced or part.dtype(tasks))
        for part in block.parts
    }
