"""Merge the groups of blocks: for files, or in memory at one size after the other.

What is made is what `storage.stored` lists, in its order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts, Masked
from mergekit_ext.flexmerge.finite import require_finite, require_in_range
from mergekit_ext.flexmerge.layout import BlockLayout, Part
from mergekit_ext.flexmerge.manifest import BASE, DENSE, MASKED, MASKS, UNIFIED
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.flexmerge.storage import Place, StoredGroup, sources, stored

# Below this share of a dtype's largest value no rounding leads out of its range.
_SAFE_RANGE = 0.9


@dataclass(frozen=True)
class Merging:
    """How the members of a group become what is stored.

    Attributes:
        algorithm: merges them.
        cuts: what trimming keeps of each model.
        forced: the dtype of all shareable tensors, if it is not that of the inputs.
    """

    algorithm: Algorithm
    cuts: Cuts | None = None
    forced: torch.dtype | None = None


def block_tensors(
    reader: BlockReader,
    block: BlockLayout,
    groups: Sequence[StoredGroup],
    merging: Merging,
    own: Callable[[int, Part], Tensor],
    rescale: dict[int, float],
) -> Iterator[tuple[Place, str, Tensor]]:
    """Yield what is stored of some groups of a block: its place, its name, and the tensor.

    Args:
        reader: reads the block; its memory, which the base's tensors lie in, is used again.
        block: the block.
        groups: of its groups those that are wanted.
        merging: how.
        own: returns a tensor of a task that is alone.
        rescale: receives the rescaler of each task whose group is masked.

    Raises:
        MergeError: a merged or reconstructed tensor is not finite in its dtype.
    """
    shared = [task for group in groups if len(group.tasks) > 1 for task in group.tasks]
    data = reader.read(block, shared) if shared else None
    if data is not None and any(group.kind == MASKED for group in groups):
        for index, part in enumerate(block.parts):
            base = data.part(data.base, index).to("cpu", part.base_dtype)
            yield Place(BASE, ()), part.name, base
    for group in groups:
        if len(group.tasks) == 1:
            for part in block.parts:
                yield Place(DENSE, group.tasks), part.name, own(group.tasks[0], part)
            continue
        assert data is not None
        dtype = merging.forced or block.dtype(group.tasks)
        members = (data, group.tasks, dtype, merging.cuts)
        if group.kind == DENSE:
            vector = merging.algorithm.merge(*members)
            yield from _parts(Place(DENSE, group.tasks), block, vector, merging.forced)
            continue
        found = merging.algorithm.merge_masked(*members)
        _require_reconstructible(group, found, data, merging.forced)
        yield from _parts(Place(UNIFIED, group.tasks), block, found.unified, merging.forced)
        for task in group.tasks:
            yield Place(MASKS, (task,)), block.name, found.masks[task].cpu()
        rescale.update(found.rescale)


def _parts(
    place: Place, block: BlockLayout, vector: Tensor, forced: torch.dtype | None
) -> Iterator[tuple[Place, str, Tensor]]:
    for part in block.parts:
        dtype = forced or part.dtype(place.tasks)
        tensor = vector[part.slice].view(part.shape).to("cpu", dtype)
        require_in_range(tensor, part.name)
        yield place, part.name, tensor


def _require_reconstructible(
    group: StoredGroup, found: Masked, data: BlockData, forced: torch.dtype | None
) -> None:
    """Check that the weights that readers will make of a masked group are finite."""
    for index, part in enumerate(data.layout.parts):
        if not math.prod(part.shape):
            continue
        dtype = forced or part.dtype(group.tasks)
        base = data.part(data.base, index).abs().max()
        step = found.unified[part.slice].abs().max()
        most = float(base) + max(found.rescale.values()) * float(step)
        if most < _SAFE_RANGE * torch.finfo(dtype).max:
            continue
        for task in group.tasks:
            made = found.vector(data.base, task)[part.slice].to(dtype)
            require_in_range(made, part.name)


class Walk:
    """The models of a FlexMerge in memory, at one size after the other.

    Only what changes from size to size is merged; a merged tensor is one for its group.

    Args:
        reader: reads the blocks.
        merging: how groups are merged.

    Raises:
        NonFiniteError: a private tensor holds NaN or infinity.
    """

    def __init__(self, reader: BlockReader, merging: Merging):
        self._reader, self._merging = reader, merging
        blocks = reader.layout.blocks
        self._groups: list[list[StoredGroup]] = [[] for _ in blocks]
        self._tensors: list[dict[Place, dict[str, Tensor]]] = [{} for _ in blocks]
        self._rescale: list[dict[int, float]] = [{} for _ in blocks]
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
        for index, groups in enumerate(plan.groups):
            # Without similarities, which do not change what is stored.
            wanted = [StoredGroup(group.tasks, group.kind) for group in groups]
            if set(wanted) != set(self._groups[index]):
                changed += 1
                self._change(index, wanted)
        return changed

    def tensors(self, task: int) -> dict[str, Tensor]:
        """Return every tensor of one task at the present size, as a checkpoint of it holds them.

        On the CPU. Not to be written to: other tasks and later sizes have the same tensors.
        """
        found = dict(self._private[task])
        for index, block in enumerate(self._reader.layout.blocks):
            held = self._tensors[index]
            group = next(group for group in self._groups[index] if task in group.tasks)
            where = sources(block.name, block.shapes, group, task, self._rescale[index])
            for name, source in where:
                if isinstance(source, Place):
                    found[name] = held[source][name]
                else:
                    found[name] = source.reconstructed(name, partial(_held, held))
        return found

    def _change(self, index: int, wanted: list[StoredGroup]) -> None:
        block, before = self._reader.layout.blocks[index], self._groups[index]
        new = [group for group in wanted if group not in before]
        held, rescale = self._tensors[index], self._rescale[index]
        for place, name, tensor in block_tensors(
            self._reader, block, new, self._merging, self._own, rescale
        ):
            kept = tensor.clone() if place.kind == BASE else tensor
            held.setdefault(place, {})[name] = kept
        needed = {place for place, _, _ in stored(block.name, block.shapes, wanted)}
        self._tensors[index] = {place: found for place, found in held.items() if place in needed}
        self._groups[index] = wanted

    def _own(self, task: int, part: Part) -> Tensor:
        tensor = self._reader.tensor(task, part.name)
        if self._merging.forced is not None:
            tensor = tensor.to(self._merging.forced)
            require_in_range(tensor, part.name)
        return tensor


def _held(tensors: Mapping[Place, Mapping[str, Tensor]], place: Place, name: str) -> Tensor:
    return tensors[place][name]
