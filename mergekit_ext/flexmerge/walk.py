"""The models of a FlexMerge in memory, at one size after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts
from mergekit_ext.flexmerge.finite import require_finite, require_in_range
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.manifest import MASKED
from mergekit_ext.flexmerge.plan import Plan, StoredGroup
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.kernels.masks import reconstruct, unpack_bits


@dataclass(frozen=True)
class _Dense:
    """A group's tensors, which its tasks share."""

    tensors: Mapping[str, Tensor]

    def of(self, task: int) -> Mapping[str, Tensor]:
        return self.tensors


@dataclass(frozen=True)
class _Reconstructed:
    """A masked group as a checkpoint stores it; each task's tensors are made when asked for.

    Attributes:
        base: by name, in the dtype that the base stores.
        unified: by name, in the dtype that the tasks' tensors have. A block may hold several
            dtypes, and each tensor is rounded to its own before it is masked.
        masks: by task, the bits of the whole block.
        rescale: by task.
    """

    block: BlockLayout
    base: Mapping[str, Tensor]
    unified: Mapping[str, Tensor]
    masks: Mapping[int, Tensor]
    rescale: Mapping[int, float]

    def of(self, task: int) -> Mapping[str, Tensor]:
        mask = unpack_bits(self.masks[task], self.block.size)
        rescale = self.rescale[task]
        found = {}
        for part in self.block.parts:
            base, unified = self.base[part.name], self.unified[part.name]
            made = reconstruct(base, unified, mask[part.slice], rescale, unified.dtype)
            require_in_range(made, part.name)
            found[part.name] = made
        return found


_Stored: TypeAlias = "_Dense | _Reconstructed"


class Walk:
    """Goes from size to size, merging only what changed; a merged tensor is one for its group.

    Args:
        reader: reads the blocks.
        algorithm: merges the members of a group.
        cuts: what trimming keeps of each model.
        forced: the dtype of all shareable tensors, if it is not that of the inputs.

    Raises:
        NonFiniteError: a private tensor holds NaN or infinity.
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
        for task, tensors in zip(reader.layout.tasks, self._private, strict=True):
            for name, tensor in tensors.items():
                require_finite(tensor, name, task)

    def go(self, plan: Plan) -> int:
        """Change to the groups of `plan`; return how many blocks had to be touched.

        Raises:
            MergeError: a merged tensor is not finite in its dtype.
        """
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
        """Every tensor of one task at the present size, as a checkpoint of that size holds it.

        On the CPU. Not to be written to: other tasks and later sizes have the same tensors.

        Raises:
            MergeError: a reconstructed tensor is not finite in its dtype.
        """
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
            unified = self._split(block, found.unified, group)
            masks = {task: mask.cpu() for task, mask in found.masks.items()}
            return _Reconstructed(block, _base(data), unified, masks, found.rescale)
        vector = self._algorithm.merge(data, group.tasks, dtype, self._cuts)
        return _Dense(self._split(block, vector, group))

    def _own(self, block: BlockLayout, task: int) -> Iterator[tuple[str, Tensor]]:
        for part in block.parts:
            tensor = self._reader.tensor(task, part.name)
            if self._forced is not None:
                tensor = tensor.to(self._forced)
                require_in_range(tensor, part.name)
            yield part.name, tensor

    def _split(self, block: BlockLayout, vector: Tensor, group: StoredGroup) -> dict[str, Tensor]:
        tensors = {}
        for part in block.parts:
            dtype = self._forced or part.dtype(group.tasks)
            tensors[part.name] = vector[part.slice].view(part.shape).to("cpu", dtype)
            require_in_range(tensors[part.name], part.name)
        return tensors


def _base(data: BlockData) -> dict[str, Tensor]:
    """The base's tensors as they are stored; copied, as the reader's memory is used again."""
    return {
        part.name: data.part(data.base, index).to("cpu", part.base_dtype, copy=True)
        for index, part in enumerate(data.layout.parts)
    }


def _key(group: StoredGroup) -> StoredGroup:
    """A group without its similarity, which does not change what is stored."""
    return StoredGroup(group.tasks, group.kind)
