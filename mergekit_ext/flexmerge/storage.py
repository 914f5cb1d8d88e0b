"""What groups of tasks store of each block: the one rule behind sizes, files and their reading.

docs/flexmerge-format.md, "Shards". Tasks are named by index where a merge is planned and written,
and by name in a manifest: `Place` and `stored` work with either.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_ext.core.memory import FIRST_BYTES, count_or_bytes
from mergekit_ext.errors import Problem
from mergekit_ext.flexmerge.layout import BlockLayout, Layout, matrix_shape
from mergekit_ext.flexmerge.manifest import (
    BASE,
    DENSE,
    FACTORS,
    MASKED,
    MASKS,
    RESIDUAL,
    UNIFIED,
    FileKind,
)
from mergekit_ext.kernels.linear_algebra import add_products
from mergekit_ext.kernels.masks import reconstruct, unpack_bits

EXPECTED = "a number of models such as 2.25, or a memory budget such as '12GB'"
# A budget that holds every merge, where all sizes are wanted.
ANY_SIZE = "1000000TB"
# Sizes are ratios of byte counts: 2.25 must hold a merge of exactly 2.25 models.
_ROUNDING = 1e-9
# From here on masks and one vector are smaller than the members themselves.
_MASKED_FROM = 3
# What the names of factors end in: B, and A.
FACTOR_ENDS = (".lora_B", ".lora_A")
_B, _A = FACTOR_ENDS

Shape: TypeAlias = tuple[int, ...]
# Partitions of the tasks, with the similarity that each group was merged at.
Partition: TypeAlias = Sequence[tuple[tuple[int, ...], float | None]]


@dataclass(frozen=True)
class Size:
    """The bytes of all tensors that are stored, of private ones among them, and of a unit.

    `unit_bytes`: of the shareable tensors of one model, on average over the inputs.
    """

    bytes: int
    unit_bytes: float
    private_bytes: int

    @property
    def models(self) -> float:
        """``(bytes - private_bytes) / unit_bytes``: m when nothing is shared."""
        return (self.bytes - self.private_bytes) / self.unit_bytes


@dataclass(frozen=True)
class Target:
    """What a merge may occupy: so many `models` (or adapters), as `Size.models`; or `bytes`."""

    models: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: object, expected: str = EXPECTED) -> Target:
        """Read a size as `count_or_bytes` does; raise `ValueError` with `expected`."""
        return cls(*count_or_bytes(value, expected))

    def holds(self, size: Size) -> bool:
        """Return whether a merge of that size is small enough."""
        if self.bytes is not None:
            return size.bytes <= self.bytes
        return size.models <= (self.models or 0) * (1 + _ROUNDING)

    def exceeds(self, largest: Size) -> bool:
        """Return whether it is above the size at which nothing is merged; a budget may be."""
        return self.models is not None and self.models > largest.models * (1 + _ROUNDING)

    def __str__(self) -> str:
        return f"{self.models:.15g}" if self.bytes is None else f"{self.bytes} bytes"


@dataclass(frozen=True)
class StoredGroup:
    """Tasks that share what is stored of a block."""

    tasks: tuple[int, ...]
    kind: str = DENSE
    similarity: float | None = None
    own: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    ranks: Mapping[int, Mapping[str, int]] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> list[Any]:
        """Return what decides the bytes that are stored, as JSON has it."""
        ranks = [sorted(self.ranks[task].items()) for task in self.ranks]
        return [list(self.tasks), self.kind, list(self.own), ranks]


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

    The name of the block is that of its masks. The groups, which partition the tasks, are
    `StoredGroup` or a manifest's; `shapes` are in the order of concatenation.
    """
    bits = 0
    if any(group.kind == MASKED for group in groups):
        bits = sum(map(math.prod, shapes.values()))
        for name, shape in shapes.items():
            yield _BASE, name, shape
    for group in groups:
        if group.kind == RESIDUAL:
            yield from _stored_residual(shapes, group)
            continue
        masked = group.kind == MASKED
        place = Place(UNIFIED if masked else DENSE, group.tasks)
        for name, shape in shapes.items():
            yield place, name, shape
        for task in group.tasks if masked else ():
            yield Place(MASKS, (task,)), block, (-(-bits // 8),)


def _stored_residual(shapes: Mapping[str, Shape], group: Any) -> Iterator[tuple[Place, str, Shape]]:
    for name, shape in shapes.items():
        if name in group.own:
            for task in group.tasks:
                yield Place(DENSE, (task,)), name, shape
            continue
        yield Place(UNIFIED, group.tasks), name, shape
        count, rows, columns = matrix_shape(shape, name in group.stacked)
        stack = (count,) if name in group.stacked else ()
        for task in group.tasks:
            if rank := group.ranks[task].get(name):
                yield Place(FACTORS, (task,)), name + _B, (*stack, rows, rank)
                yield Place(FACTORS, (task,)), name + _A, (*stack, rank, columns)


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
        elif place.kind == FACTORS:
            part = parts[name.removesuffix(_A).removesuffix(_B)]
            yield place, name, shape, forced or part.dtype(range(len(part.dtypes)))
        else:
            yield place, name, shape, forced or parts[name].dtype(place.tasks)


@dataclass(frozen=True)
class MaskedTensor:
    """What one task's tensor of a masked block is made of; `block` is the name of the masks.

    The tensor is `count` elements of the block from `start` on.
    """

    block: str
    unified: Place
    masks: Place
    rescale: float
    start: int
    count: int

    def reconstructed(self, name: str, read: Callable[[Place, str], Tensor]) -> Tensor:
        """Return the task's tensor, made of what `read` finds at a place by a name."""
        base, unified = read(_BASE, name), read(self.unified, name)
        # The bytes that hold this tensor's bits, the first of which may start in mid-byte.
        first, before = divmod(self.start, 8)
        bits = read(self.masks, self.block)[first : -(-(self.start + self.count) // 8)]
        mask = unpack_bits(bits, before + self.count)[before:]
        return reconstruct(base, unified, mask, self.rescale, unified.dtype)


@dataclass(frozen=True)
class ResidualTensor:
    """What one task's tensor of a residual block is made of: a base, and factors."""

    unified: Place
    factors: Place

    def reconstructed(self, name: str, read: Callable[[Place, str], Tensor]) -> Tensor:
        """Return ``theta_0 + B A``, rounded once; `read` finds what is at a place by a name."""
        theta_0 = read(self.unified, name)
        wide = torch.promote_types(theta_0.dtype, torch.float32)
        b, a = (read(self.factors, name + end).to(wide) for end in (_B, _A))
        b, a = (b, a) if b.dim() == 3 else (b[None], a[None])
        stack = theta_0.to(wide).reshape(len(b), b.shape[1], a.shape[2])
        return add_products(stack, b, a, 1.0).view(theta_0.shape).to(theta_0.dtype)


Made: TypeAlias = MaskedTensor | ResidualTensor


def sources(
    block: str, shapes: Mapping[str, Shape], group: Any, task: Any, rescale: Mapping[Any, float]
) -> Iterator[tuple[str, Place | Made]]:
    """Yield where each tensor of one task's group comes from: a place, or what it is made of."""
    start = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        if group.kind == MASKED:
            unified, masks = Place(UNIFIED, group.tasks), Place(MASKS, (task,))
            yield name, MaskedTensor(block, unified, masks, rescale[task], start, count)
        elif group.kind == RESIDUAL and name not in group.own:
            unified = Place(UNIFIED, group.tasks)
            ranked = name in group.ranks[task]
            yield name, ResidualTensor(unified, Place(FACTORS, (task,))) if ranked else unified
        elif group.kind == RESIDUAL:
            yield name, Place(DENSE, (task,))
        else:
            yield name, Place(DENSE, group.tasks)
        start += count


class GroupStorage(ABC):
    """How the groups of a family of models are stored: so many blocks of so many tasks.

    `private_bytes` are those of what is never shared.
    """

    what = "models"  # or adapters, of which sizes are numbers

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
    def advice(self, target: Target) -> str:
        """Return what makes smaller sizes possible."""

    def groups(self, found: Partition) -> tuple[StoredGroup, ...]:
        """Return the groups that are stored of a partition."""
        return tuple(StoredGroup(tasks, DENSE, similarity) for tasks, similarity in found)

    @cached_property
    def apart(self) -> tuple[StoredGroup, ...]:
        """Every task by itself."""
        return tuple(StoredGroup((task,)) for task in range(self.tasks))

    @cached_property
    def whole(self) -> int:
        """Bytes of all shareable tensors of all tasks, kept apart."""
        return sum(self.bytes(block, self.apart) for block in range(self.blocks))

    def size(self, shareable: int) -> Size:
        """Return the size of a merge that stores so many bytes of blocks."""
        return Size(shareable + self.private_bytes, self.whole / self.tasks, self.private_bytes)

    def problem(self, target: Target, least: Size | None = None) -> Problem | None:
        """Return what is wrong with a target that is not between `least` and all kept apart."""
        least, most = least or self.least, self.size(self.whole)
        if target.holds(least) and not target.exceeds(most):
            return None
        low, high = f"{math.ceil(least.models * 1e4 - 1e-6) / 1e4:.10g}", f"{most.models:.10g}"
        if target.exceeds(most):
            remedy = f"Write {high}, at which nothing is merged, or less."
        else:
            smallest = low if target.bytes is None else f"'{least.bytes}B'"
            remedy = f"Write {smallest} for the smallest. {self.advice(target)}".strip()
        unit = "" if target.models is None else f" {self.what}"
        return Problem(
            "parameters.target_size",
            f"{target}{unit} (numbers below {FIRST_BYTES} are {self.what}, others bytes)",
            f"what can be reached: {low} to {high} {self.what}, or {least.bytes} bytes and more",
            remedy,
        )


class Storage(GroupStorage):
    """How groups of models are stored, in the dtype `forced` if one is asked for.

    With `masks` groups from three on become a unified vector and masks; smaller ones are kept as
    they are.
    """

    def __init__(self, layout: Layout, masks: bool = False, forced: torch.dtype | None = None):
        super().__init__(len(layout.blocks), len(layout.tasks), layout.private_bytes)
        self.layout, self.masks, self.forced = layout, masks, forced

    def groups(self, found: Partition) -> tuple[StoredGroup, ...]:
        groups: list[StoredGroup] = []
        for tasks, similarity in found:
            if len(tasks) == 1 or (self.masks and len(tasks) < _MASKED_FROM):
                groups.extend(StoredGroup((task,)) for task in tasks)
            else:
                groups.append(StoredGroup(tasks, MASKED if self.masks else DENSE, similarity))
        return tuple(sorted(groups, key=lambda group: group.tasks[0]))

    def bytes(self, block: int, groups: Sequence[StoredGroup]) -> int:
        entries = stored_of(self.layout.blocks[block], groups, self.forced)
        return sum(math.prod(shape) * dtype.itemsize for _, _, shape, dtype in entries)

    @cached_property
    def least(self) -> Size:
        """Every block merged, or kept apart where that is smaller.

        Masks over a base of a wider dtype may take more than they save.
        """
        merged = self.groups([(tuple(range(self.tasks)), None)])
        blocks = range(self.blocks)
        return self.size(sum(min(self.bytes(b, merged), self.bytes(b, self.apart)) for b in blocks))

    def advice(self, target: Target) -> str:
        parts = [part for block in self.layout.blocks for part in block.parts]
        mixed = any(len(set(part.dtypes)) > 1 for part in parts)
        if self.masks or self.forced is not None or not mixed:
            return ""
        return (
            "The models' dtypes differ, and what is shared takes the widest: with `dtype:` all are "
            "stored in one, and size 1 can be reached."
        )
