"""What is stored of each block: the one rule behind files, their reading, and sizes.

docs/flexmerge-format.md, "Shards". Tasks are named by index where a merge is planned and written,
and by name in a manifest: `Place` and `stored` work with either.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_ext.flexmerge.layout import BlockLayout, matrix_shape
from mergekit_ext.flexmerge.manifest import FileKind, GroupKind
from mergekit_ext.kernels.linear_algebra import add_products
from mergekit_ext.kernels.masks import reconstruct, unpack_bits

# What the names of factors end in: B, and A.
FACTOR_ENDS = (".lora_B", ".lora_A")
_B, _A = FACTOR_ENDS

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class StoredGroup:
    """Tasks that share what is stored of a block."""

    tasks: tuple[int, ...]
    kind: GroupKind = "dense"
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


_BASE = Place("base", ())


def stored(
    block: str, shapes: Mapping[str, Shape], groups: Sequence[Any]
) -> Iterator[tuple[Place, str, Shape]]:
    """Yield every tensor that is stored of a block: its place, name and shape, in order.

    The name of the block is that of its masks. The groups, which partition the tasks, are
    `StoredGroup` or a manifest's; `shapes` are in the order of concatenation.
    """
    bits = 0
    if any(group.kind == "masked" for group in groups):
        bits = sum(map(math.prod, shapes.values()))
        for name, shape in shapes.items():
            yield _BASE, name, shape
    for group in groups:
        for name, shape in shapes.items():
            if group.kind == "residual" and name in group.own:
                for task in group.tasks:
                    yield Place("dense", (task,)), name, shape
                continue
            yield Place("dense" if group.kind == "dense" else "unified", group.tasks), name, shape
            for task, ranks in group.ranks.items():
                if rank := ranks.get(name):
                    count, rows, columns = matrix_shape(shape, name in group.stacked)
                    stack = (count,) if name in group.stacked else ()
                    yield Place("factors", (task,)), name + _B, (*stack, rows, rank)
                    yield Place("factors", (task,)), name + _A, (*stack, rank, columns)
        for task in group.tasks if group.kind == "masked" else ():
            yield Place("masks", (task,)), block, (-(-bits // 8),)


def stored_of(
    block: BlockLayout, groups: Sequence[StoredGroup], forced: torch.dtype | None
) -> Iterator[tuple[Place, str, Shape, torch.dtype]]:
    """Yield what `stored` does of a block of models, and in which dtype."""
    parts = {part.name: part for part in block.parts}
    for place, name, shape in stored(block.name, block.shapes, groups):
        if place.kind == "masks":
            yield place, name, shape, torch.uint8
        elif place.kind == "base":
            yield place, name, shape, parts[name].base_dtype
        elif place.kind == "factors":
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
    """What one task's tensor of a residual block is made of: a base and, if `ranked`, factors."""

    unified: Place
    factors: Place
    ranked: bool

    def stored(self, name: str) -> Iterator[tuple[Place, str]]:
        """Yield the places and names of theta_0, B and A, as far as they are stored."""
        yield self.unified, name
        for end in FACTOR_ENDS if self.ranked else ():
            yield self.factors, name + end

    def reconstructed(self, name: str, read: Callable[[Place, str], Tensor]) -> Tensor:
        """Return ``theta_0 + B A``, rounded once; `read` finds what is at a place by a name."""
        return restored(*(read(*key) for key in self.stored(name)))


def restored(theta_0: Tensor, *factors: Tensor) -> Tensor:
    """Return ``theta_0 + B A``, rounded once, or theta_0 itself where there are no factors.

    B and A are (rows, r) and (r, columns), or of stacked matrices (n, rows, r) and (n, r, columns).
    """
    if not factors:
        return theta_0
    wide = torch.promote_types(theta_0.dtype, torch.float32)
    b, a = (factor.to(wide) for factor in factors)
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
        if group.kind == "masked":
            unified, masks = Place("unified", group.tasks), Place("masks", (task,))
            yield name, MaskedTensor(block, unified, masks, rescale[task], start, count)
        elif group.kind == "residual" and name in group.own:
            yield name, Place("dense", (task,))
        elif group.kind == "residual":
            unified, ranked = Place("unified", group.tasks), name in group.ranks[task]
            made = ResidualTensor(unified, Place("factors", (task,)), ranked)
            yield name, made if any(name in r for r in group.ranks.values()) else unified
        else:
            yield name, Place("dense", group.tasks)
        start += count
