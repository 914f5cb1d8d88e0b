"""DARE in front of any algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Masked, deltas_of
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.dare import drop_and_rescale
from mergekit_ext.kernels.seeds import derived


class Dare(Algorithm):
    """Yu et al. 2024: each task vector is thinned at random and rescaled before it is merged.

    What is dropped depends on seed, block and task alone: not on the group, and not on what was
    merged before.
    """

    def __init__(self, inner: Algorithm, density: float, seed: int):
        super().__init__(inner.parameters)
        self._inner, self._density, self._seed = inner, density, seed
        # What FlexMerge asks of an algorithm is the inner one's to answer.
        self.name, self.trims = inner.name, inner.trims
        self.masks, self.kmeans = inner.masks, inner.kmeans

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: thinned task vectors beside the first."""
        return self._inner.copies(models, square) + 2 * models + 4

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """See `Algorithm.merge`."""
        relative = self._thinned(block, members)
        merged = self._inner.merge(relative, members, relative.base.dtype, cuts)
        return merged.add_(block.base.to(merged.dtype)).to(dtype)

    def merge_masked(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Masked:
        """See `Algorithm.merge_masked`."""
        return self._inner.merge_masked(self._thinned(block, members), members, dtype, cuts)

    def _thinned(self, block: BlockData, members: Sequence[int]) -> BlockData:
        """The members' thinned task vectors, over a base of zeros."""
        vectors = {}
        deltas = deltas_of(block, members)
        for member, delta in zip(members, deltas, strict=True):
            seed = derived(self._seed, block.layout.name, member)
            generator = torch.Generator().manual_seed(seed)
            vectors[member] = drop_and_rescale(delta, self._density, generator)
        return BlockData(block.layout, torch.zeros_like(deltas[0]), vectors)
