"""TSV-M: task singular vectors, matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Option, deltas_of
from mergekit_ext.flexmerge.algorithms.linear import WEIGHT
from mergekit_ext.flexmerge.algorithms.trimming import SCALE
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.tsv import tsv_merge


class TsvM(Algorithm):
    """Gargiulo et al. 2025, "Task Singular Vectors", TSV-M: see `kernels.tsv.tsv_merge`.

    Each tensor of the block on its own: singular vectors are those of a matrix.
    """

    name = "tsv_m"
    by_tensor = True
    options: ClassVar[tuple[Option, ...]] = (SCALE, WEIGHT)

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: decompositions in float64, one for each thread."""
        at_once = min(models, torch.get_num_threads())
        return models + 10 + 12 * square + at_once * (6 + 12 * square)

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """See `Algorithm.merge`."""
        deltas = deltas_of(block, members)
        for weight, delta in zip(self.parameters.each("weight", members), deltas, strict=True):
            delta.mul_(weight)
        out = torch.empty_like(block.base, dtype=dtype)
        for index, part in enumerate(block.layout.parts):
            tensors = [block.part(delta, index) for delta in deltas]
            merged = tsv_merge(tensors, part.matrices)
            merged = merged.reshape(-1).mul_(self.parameters.shared["lambda"])
            out[part.slice] = merged.add_(block.base[part.slice].to(merged.dtype))
        return out
