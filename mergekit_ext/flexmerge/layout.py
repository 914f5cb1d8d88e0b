"""The blocks of a FlexMerge: which tensors lie in each, and what each task keeps for itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch

from mergekit_ext.declared.method import layout_of
from mergekit_ext.io.headers import TensorHeader, dtype_name

# Dtypes that arithmetic on task vectors makes sense for, by their names in the format.
FLOATING = {dtype_name(d): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def matrix_shape(shape: Sequence[int], stacked: bool) -> tuple[int, int, int]:
    """Return how many matrices a tensor is, and their rows and columns; a vector is one column."""
    if stacked:
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    return 1, math.prod(shape[:1]), math.prod(shape[1:])


@dataclass(frozen=True)
class Part:
    """One tensor of a block; it begins at `start` of the concatenated block vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    dtypes: tuple[torch.dtype, ...]  # that of each task's model
    base_dtype: torch.dtype

    @property
    def layout(self) -> str:
        """How kernels see it; see `layout_of`."""
        return layout_of(self.name, len(self.shape))

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """How many matrices it is, and their rows and columns."""
        return matrix_shape(self.shape, self.layout == "stacked")

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + math.prod(self.shape))

    def dtype(self, tasks: Sequence[int]) -> torch.dtype:
        """Return the dtype that holds the values of all `tasks`."""
        return reduce(torch.promote_types, (self.dtypes[task] for task in tasks))


@dataclass(frozen=True)
class BlockLayout:
    """Tensors that are merged as one vector."""

    name: str
    kind: str
    depth: int | None
    parts: tuple[Part, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {part.name: part.shape for part in self.parts}

    @property
    def size(self) -> int:
        """Elements of the block vector."""
        return self.parts[-1].slice.stop

    def bytes(self, tasks: Sequence[int], forced: torch.dtype | None = None) -> int:
        """Return the bytes of one dense copy that `tasks` share."""
        return sum(math.prod(p.shape) * (forced or p.dtype(tasks)).itemsize for p in self.parts)

    @property
    def base_bytes(self) -> int:
        return sum(math.prod(part.shape) * part.base_dtype.itemsize for part in self.parts)

    def dtype(self, tasks: Sequence[int]) -> torch.dtype:
        """Return the dtype that holds every tensor of all `tasks`."""
        return reduce(torch.promote_types, (part.dtype(tasks) for part in self.parts))


@dataclass(frozen=True)
class Layout:
    """Blocks in network order, what each task keeps for itself, and what is one model's in all.

    `given` are the tensors of the model `giver`, -1 for the base, that every task has.
    """

    tasks: tuple[str, ...]
    blocks: tuple[BlockLayout, ...]
    private: tuple[tuple[TensorHeader, ...], ...]
    given: tuple[TensorHeader, ...] = ()
    giver: int = -1

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that task vectors are formed in, the same in every block."""
        parts = [part for block in self.blocks for part in block.parts]
        stored = {dtype for part in parts for dtype in (part.base_dtype, *part.dtypes)}
        return torch.float64 if torch.float64 in stored else torch.float32

    @cached_property
    def copied(self) -> tuple[TensorHeader, ...]:
        """What is not merged, once for each copy that is stored."""
        return (*self.given, *(header for headers in self.private for header in headers))

    @cached_property
    def private_bytes(self) -> int:
        """Bytes of what is not merged."""
        return sum(header.nbytes for header in self.copied)
