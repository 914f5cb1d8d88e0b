"""What a merging algorithm is to FlexMerge: F, from the members' block vectors to one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.masks import reconstruct, unpack_bits
from mergekit_ext.kernels.numerics import compute_dtype
from mergekit_ext.kernels.selection import Cut

# For each task the cut that trims its whole model.
Cuts = Sequence[Cut]


@dataclass(frozen=True)
class Option:
    """A parameter of an algorithm, as it stands in YAML.

    Attributes:
        annotation: its type, as pydantic understands it.
        default: its value when it is not given.
        per_model: whether it may differ between models.
    """

    name: str
    annotation: Any
    default: Any
    description: str
    per_model: bool = False


@dataclass(frozen=True)
class Parameters:
    """An algorithm's parameters.

    Attributes:
        shared: by name.
        models: for each task, by name.
        trim_scope: what `density` is a share of: ``model``, ``block`` or ``tensor``.
    """

    shared: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    trim_scope: str = "model"

    def each(self, name: str, members: Sequence[int]) -> list[Any]:
        """A per-model parameter of the members."""
        return [self.models[member][name] for member in members]


@dataclass(frozen=True)
class Masked:
    """A group that is stored as one vector and one mask for each member.

    Attributes:
        unified: the unified task vector, (n,).
        masks: for each member ceil(n/8) bytes; see `kernels.masks`.
        rescale: for each member the factor of its reconstruction.
    """

    unified: Tensor
    masks: Mapping[int, Tensor]
    rescale: Mapping[int, float]

    def vector(self, base: Tensor, member: int) -> Tensor:
        """The block vector of one member, in the dtype of `unified`."""
        mask = unpack_bits(self.masks[member], self.unified.numel())
        return reconstruct(base, self.unified, mask, self.rescale[member], self.unified.dtype)


@dataclass(frozen=True)
class Piece:
    """Some entries of some groups' merged vectors.

    Attributes:
        groups: which groups, one for each row.
        part: which entries of the block, one for each column.
        vectors: (groups, entries); the memory is used again for the next piece.
    """

    groups: slice
    part: slice
    vectors: Tensor


class Algorithm(ABC):
    """Merges the members of a group into one block vector.

    Attributes:
        name: as in YAML.
        options: its parameters.
        trims: whether it trims task vectors to their largest entries (then it has a ``density``).
        masks: whether groups from three on are stored as `Masked`.
        kmeans: whether groups are K-means clusters instead of a dendrogram's.
        by_tensor: whether the tensors of a block are merged one after the other.
    """

    name: str
    options: ClassVar[tuple[Option, ...]]
    trims: bool = False
    masks: bool = False
    kmeans: bool = False
    by_tensor: bool = False

    def __init__(self, parameters: Parameters):
        self.parameters = parameters

    @property
    def densities(self) -> list[float] | None:
        """For each task the share of its whole model that is kept; None if that is not asked."""
        if not self.trims or self.parameters.trim_scope != "model":
            return None
        count = len(self.parameters.models)
        if "density" in self.parameters.shared:
            return [self.parameters.shared["density"]] * count
        return self.parameters.each("density", range(count))

    @abstractmethod
    def copies(self, models: int, square: float) -> float:
        """Return how many copies of a block merging all models holds at once.

        Of a tensor if it merges `by_tensor`; arguments as for `memory.working`.
        """

    @abstractmethod
    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """Return the merged weights, base included: (n,), in `dtype`.

        Args:
            block: the original vectors of all tasks.
            members: two tasks or more.
            dtype: of the result, rounded to once.
            cuts: with `trims` and the scope ``model``, what is kept of each task's model.
        """

    def sequence(
        self, block: BlockData, groups: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> Iterator[Piece]:
        """Merge all groups; their vectors come in pieces, in any order, each entry once.

        Args:
            block: the original vectors of all tasks.
            groups: each is the union of two that came before, or of single tasks.
            dtype: of the results.
        """
        for index, members in enumerate(groups):
            merged = self.merge(block, members, dtype)
            yield Piece(slice(index, index + 1), slice(0, merged.numel()), merged[None])

    def merge_masked(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Masked:
        """Return what is stored of a group of an algorithm that `masks`. Arguments as above."""
        raise NotImplementedError(f"{self.name} stores no masks")


def deltas_of(block: BlockData, members: Sequence[int]) -> list[Tensor]:
    """Task vectors in float32 (float64 if an input is)."""
    dtype = compute_dtype([block.base, *block.models.values()])
    base = block.base.to(dtype)
    return [block.models[member].to(dtype) - base for member in members]
