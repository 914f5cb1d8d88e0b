"""What groups of tasks store of each block: the one rule behind sizes, files and their reading.

docs/flexmerge-format.md, "Shards". Tasks are named by index where a merge is planned and written,
and by name in a manifest: `Place` and `stored` work with either.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.manifest import BASE, DENSE, MASKED, MASKS, UNIFIED, FileKind
from mergekit_ext.flexmerge.target import Size, Target, out_of_reach
from mergekit_ext.kernels.masks import reconstruct, unpack_bits

# From here on masks and one vector are smaller than the members themselves.
_MASKED_FROM = 3

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class StoredGroup:
    """Tasks that share what is stored of a block."""

    tasks: tuple[int, ...]
    kind: str = DENSE
    similarity: float | None = None


class Place(NamedTuple):
    """The files of one kind that belong to one set of tasks; those of the base belong to none.

    A tensor's name occurs in them once.
    """

    kind: FileKind
    tasks: tuple[Any, ...]

    def __str__(self) -> str:
        return f"the {self.kind} files of {', '.join(self.tasks)}" if self.tasks else "the base"


_BASE = Place(BASE, ())


def stored(
    block: str, shapes: Mapping[str, Shape], groups: Sequence[Any]
) -> Iterator[tuple[Place, str, Shape]]:
    """Yield every tensor that is stored of a block: its place, name and shape, in order.

    Args:
        block: its name, which masks have.
        shapes: of its tensors, in the order in which they are concatenated.
        groups: that partition the tasks, with `tasks` and `kind` (`StoredGroup`, or a manifest's).
    """
    bits = 0
    if any(group.kind == MASKED for group in groups):
        bits = sum(math.prod(shape) for shape in shapes.values())
        for name, shape in shapes.items():
            yield _BASE, name, shape
    for group in groups:
        masked = group.kind == MASKED
        place = Place(UNIFIED if masked else DENSE, group.tasks)
        for name, shape in shapes.items():
            yield place, name, shape
        for task in group.tasks if masked else ():
            yield Place(MASKS, (task,)), block, (-(-bits // 8),)


@dataclass(frozen=True)
class MaskedTensor:
    """Where one task's tensor of a masked block comes from.

    Attributes:
        block: the masks' name.
        unified: where the unified vector is.
        masks: where the task's masks are.
        rescale: the task's.
        start: the tensor's first element in the block.
        count: its elements.
    """

    block: str
    unified: Place
    masks: Place
    rescale: float
    start: int
    count: int

    def reconstructed(
        self, name: str, read: Callable[[Place, str], Tensor], device: torch.device | None = None
    ) -> Tensor:
        """Return the task's tensor, made on a device of what `read` finds at a place by a name."""
        base, unified = read(_BASE, name).to(device), read(self.unified, name).to(device)
        # The bytes that hold this tensor's bits, the first of which may start in mid-byte.
        first, before = divmod(self.start, 8)
        bits = read(self.masks, self.block)[first : -(-(self.start + self.count) // 8)]
        mask = unpack_bits(bits.to(device), before + self.count)[before:]
        return reconstruct(base, unified, mask, self.rescale, unified.dtype)


def sources(
    block: str, shapes: Mapping[str, Shape], group: Any, task: Any, rescale: Mapping[Any, float]
) -> Iterator[tuple[str, Place | MaskedTensor]]:
    """Yield where each tensor of one task's group comes from: a place, or what it is made of."""
    start = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        if group.kind == MASKED:
            unified, masks = Place(UNIFIED, group.tasks), Place(MASKS, (task,))
            yield name, MaskedTensor(block, unified, masks, rescale[task], start, count)
        else:
            yield name, Place(DENSE, group.tasks)
        start += count


class GroupStorage(ABC):
    """How the groups of a family of models are stored, and what that takes.

    Args:
        blocks: how many there are.
        tasks: how many.
        private_bytes: of what is never shared.
    """

    def __init__(self, blocks: int, tasks: int, private_bytes: int):
        self.blocks, self.tasks, self.private_bytes = blocks, tasks, private_bytes

    @abstractmethod
    def bytes(self, block: int, groups: Sequence[StoredGroup]) -> int:
        """Return the bytes of all tensors that are stored of a block."""

    @property
    @abstractmethod
    def least(self) -> Size:
        """A size below which no partition leads, whatever the similarities."""

    @abstractmethod
    def problem(self, target: Target, least: Size) -> Problem | None:
        """Return what is wrong with a target that is not between `least` and all kept apart."""

    def groups(
        self, found: Sequence[tuple[tuple[int, ...], float | None]]
    ) -> tuple[StoredGroup, ...]:
        """Return what is stored of a partition, given with similarities."""
        return tuple(StoredGroup(tasks, DENSE, similarity) for tasks, similarity in found)

    @cached_property
    def whole(self) -> int:
        """Bytes of all shareable tensors of all tasks, kept apart."""
        apart = [StoredGroup((task,)) for task in range(self.tasks)]
        return sum(self.bytes(block, apart) for block in range(self.blocks))

    def size(self, shareable: int) -> Size:
        """Return the size of a merge that stores so many bytes of blocks."""
        return Size(shareable + self.private_bytes, self.whole / self.tasks, self.private_bytes)

    def require_reachable(self, target: Target, least: Size | None = None) -> None:
        """Raise `ConfigError` unless `target` lies between `least` and all kept apart."""
        if problem := self.problem(target, least or self.least):
            raise ConfigError([problem])


class Storage(GroupStorage):
    """How groups of models are stored.

    Args:
        layout: the blocks.
        masks: whether groups from three on become a unified vector and masks; smaller ones are
            then kept as they are.
        forced: the dtype of everything shareable, if it is not that of the inputs.
    """

    def __init__(self, layout: Layout, masks: bool = False, forced: torch.dtype | None = None):
        super().__init__(len(layout.blocks), len(layout.tasks), layout.private_bytes)
        self.layout, self.masks, self.forced = layout, masks, forced

    def groups(
        self, found: Sequence[tuple[tuple[int, ...], float | None]]
    ) -> tuple[StoredGroup, ...]:
        """See `GroupStorage.groups`."""
        groups: list[StoredGroup] = []
        for tasks, similarity in found:
            if len(tasks) == 1 or (self.masks and len(tasks) < _MASKED_FROM):
                groups.extend(StoredGroup((task,)) for task in tasks)
            else:
                groups.append(StoredGroup(tasks, MASKED if self.masks else DENSE, similarity))
        return tuple(sorted(groups, key=lambda group: group.tasks[0]))

    def bytes(self, block: int, groups: Sequence[StoredGroup]) -> int:
        """See `GroupStorage.bytes`."""
        entries = stored_of(self.layout.blocks[block], groups, self.forced)
        return sum(math.prod(shape) * dtype.itemsize for _, _, shape, dtype in entries)

    @cached_property
    def least(self) -> Size:
        """Every block merged, or kept apart where that is smaller.

        Masks over a base of a wider dtype may take more than they save.
        """
        merged = self.groups([(tuple(range(self.tasks)), None)])
        apart = [StoredGroup((task,)) for task in range(self.tasks)]
        blocks = range(self.blocks)
        return self.size(sum(min(self.bytes(b, merged), self.bytes(b, apart)) for b in blocks))

    def problem(self, target: Target, least: Size) -> Problem | None:
        """See `GroupStorage.problem`."""
        note = remedy = ""
        if dtypes := self._widening:
            note = f" (dtypes differ, {dtypes}, and what is shared takes the widest)"
            remedy = "With `dtype:` all are stored in one dtype, and size 1 can be reached."
        return out_of_reach(target, least, self.size(self.whole), "models", note, remedy)

    @property
    def _widening(self) -> str:
        """The dtypes of tensors that are larger merged than some model gives them."""
        if self.masks or self.forced is not None:
            return ""
        parts = [part for block in self.layout.blocks for part in block.parts]
        mixed = {dtype for part in parts if len(set(part.dtypes)) > 1 for dtype in part.dtypes}
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in mixed))


def stored_of(
    block: BlockLayout, groups: Sequence[StoredGroup], forced: torch.dtype | None
) -> Iterator[tuple[Place, str, Shape, torch.dtype]]:
    """Yield what `stored` does of a block of models, and in which dtype."""
    parts = {part.name: part for part in block.parts}
    for place, name, shape in stored(block.name, block.shapes, groups):
        if place.kind == MASKS:
            yield place, name, shape, torch.uint8
        elif place.kind == BASE:
            yield place, name, shape, parts[name].base_dtype
        else:
            yield place, name, shape, forced or parts[name].dtype(place.tasks)
