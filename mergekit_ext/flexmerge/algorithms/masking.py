"""EMR and Consensus: one unified vector, and a mask for each member."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Masked, Option, deltas_of
from mergekit_ext.flexmerge.algorithms.linear import WEIGHT
from mergekit_ext.flexmerge.algorithms.trimming import DENSITY, ties_over
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels import consensus, emr
from mergekit_ext.kernels.masks import pack_bits


class MaskAlgorithm(Algorithm):
    """Algorithms that reconstruct each member from a unified task vector."""

    masks = True

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: task vectors, the unified one, masks and what makes them."""
        return models * 33 / 32 + 4

    @abstractmethod
    def unified(
        self, block: BlockData, deltas: Sequence[Tensor], members: Sequence[int], cuts: Cuts | None
    ) -> Tensor:
        """The unified task vector, in the dtype of `deltas`."""

    @abstractmethod
    def mask(self, delta: Tensor, unified: Tensor) -> Tensor:
        """Where a member takes the unified vector."""

    def rescale(self, delta: Tensor, unified: Tensor) -> float:
        """The factor of a member's reconstruction."""
        return 1.0

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """The base plus the unified vector, without masks."""
        deltas = deltas_of(block, members)
        merged = self.unified(block, deltas, members, cuts)
        return merged.add_(block.base.to(merged.dtype)).to(dtype)

    def merge_masked(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Masked:
        """See `Algorithm.merge_masked`. Masks and factors are those of the unrounded vector."""
        deltas = deltas_of(block, members)
        unified = self.unified(block, deltas, members, cuts)
        pairs = list(zip(members, deltas, strict=True))
        return Masked(
            unified.to(dtype),
            {member: pack_bits(self.mask(delta, unified)) for member, delta in pairs},
            {member: self.rescale(delta, unified) for member, delta in pairs},
        )


class Emr(MaskAlgorithm):
    """Huang et al. 2024, "EMR-Merging", section 3: see `kernels.emr`."""

    name = "emr"
    options: ClassVar[tuple[Option, ...]] = ()

    def unified(
        self, block: BlockData, deltas: Sequence[Tensor], members: Sequence[int], cuts: Cuts | None
    ) -> Tensor:
        """The elected sign and the largest magnitude that agrees with it."""
        (vector,) = emr.unified([[delta] for delta in deltas])
        return vector

    def mask(self, delta: Tensor, unified: Tensor) -> Tensor:
        """Where the signs agree."""
        return emr.mask(delta, unified)

    def rescale(self, delta: Tensor, unified: Tensor) -> float:
        """The factor that keeps the mean magnitude of the task vector."""
        return emr.rescale([delta], [unified])


class Consensus(MaskAlgorithm):
    """Wang et al. 2024, "Localizing Task Information", as FlexMerge uses it (section 3.3).

    The unified vector is that of TIES; a member takes it where
    |t| >= threshold |unified - t|, with its original task vector t.
    """

    name = "consensus"
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "threshold",
            Annotated[float, Field(ge=0, le=1e6)],
            consensus.DEFAULT_THRESHOLD,
            "how much of the unified vector the masks let through",
        ),
        DENSITY,
        WEIGHT,
    )
    trims = True

    def unified(
        self, block: BlockData, deltas: Sequence[Tensor], members: Sequence[int], cuts: Cuts | None
    ) -> Tensor:
        """TIES with lambda 1."""
        vectors = dict(zip(members, deltas, strict=True))
        zero = torch.zeros_like(deltas[0])
        relative = BlockData(block.layout, zero, vectors)
        return ties_over(relative, members, self, 1.0, zero.dtype, cuts)

    def mask(self, delta: Tensor, unified: Tensor) -> Tensor:
        """See the class."""
        return consensus.mask(delta, unified, self.parameters.shared["threshold"])
