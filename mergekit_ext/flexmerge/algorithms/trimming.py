"""TIES and PCB: algorithms that trim task vectors first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Option, deltas_of
from mergekit_ext.flexmerge.algorithms.linear import WEIGHT, Factor
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.pcb import DEFAULT_CLIP, pcb_merge
from mergekit_ext.kernels.selection import Keeper
from mergekit_ext.kernels.ties import TiesOptions, cut_of, merge_ties

Share = Annotated[float, Field(gt=0, le=1)]
DENSITY = Option("density", Share, 0.1, "share of the entries that trimming keeps", per_model=True)
SCALE = Option("lambda", Factor, 1.0, "scales the merged task vector")


def slices(block: BlockData, scope: str) -> list[slice]:
    """What of a block vector is trimmed as one; the scope ``model`` has its cuts already."""
    return [part.slice for part in block.layout.parts] if scope == "tensor" else [slice(None)]


def ties_over(
    block: BlockData,
    members: Sequence[int],
    algorithm: Algorithm,
    factor: float,
    dtype: torch.dtype,
    cuts: Cuts | None,
) -> Tensor:
    """TIES with the weights, densities and trimming scope of the algorithm's parameters."""
    parameters = algorithm.parameters
    weights = parameters.each("weight", members)
    densities = parameters.each("density", members)
    kept = densities if cuts is None else [cuts[member] for member in members]
    out = torch.empty_like(block.base, dtype=dtype)
    for part in slices(block, parameters.trim_scope):
        models = [block.models[member][part] for member in members]
        options = TiesOptions(factor=factor)
        out[part] = merge_ties(block.base[part], models, weights, kept, options, dtype)
    return out


def trimmed_deltas(
    block: BlockData, members: Sequence[int], algorithm: Algorithm, cuts: Cuts | None
) -> list[Tensor]:
    """The members' task vectors, trimmed over the scope of the algorithm's parameters."""
    densities = algorithm.parameters.each("density", members)
    deltas = deltas_of(block, members)
    for member, density, delta in zip(members, densities, deltas, strict=True):
        if cuts is not None:
            Keeper(cuts[member]).drop(delta)
            continue
        for part in slices(block, algorithm.parameters.trim_scope):
            Keeper(cut_of(delta[part], density)).drop(delta[part])
    return deltas


class Ties(Algorithm):
    """Yadav et al., "TIES-Merging", section 3: trim, elect signs, average what agrees."""

    name = "ties"
    options: ClassVar[tuple[Option, ...]] = (SCALE, DENSITY, WEIGHT)
    trims = True

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: task vectors are formed in pieces."""
        return 0

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """See `kernels.ties.merge_ties` and `Algorithm.merge`."""
        return ties_over(block, members, self, self.parameters.shared["lambda"], dtype, cuts)


class Pcb(Algorithm):
    """Du et al. 2024, "PCB-Merging": see `kernels.pcb.pcb_merge`.

    With the scope ``model`` task vectors are trimmed over the whole model, as for TIES, and
    compete in the block with what is left; the drop of PCB itself then keeps everything. With
    ``block`` the drop of PCB is the only one, as in its paper. ``tensor``: the same by tensor.
    """

    name = "pcb"
    options: ClassVar[tuple[Option, ...]] = (
        SCALE,
        Option("density", Share, 0.1, "share of the entries that are kept"),
        WEIGHT,
    )
    trims = True

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: task vectors, their sum, and what trims or ranks one of them."""
        return models + 12

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """See `Algorithm.merge`."""
        density = self.parameters.shared["density"]
        deltas = deltas_of(block, members)
        if cuts is not None:
            for member, delta in zip(members, deltas, strict=True):
                Keeper(cuts[member]).drop(delta)
            density = 1.0
        for weight, delta in zip(self.parameters.each("weight", members), deltas, strict=True):
            delta.mul_(weight)
        out = torch.empty_like(block.base, dtype=dtype)
        for part in slices(block, self.parameters.trim_scope):
            (merged,) = pcb_merge([[delta[part]] for delta in deltas], density, DEFAULT_CLIP)
            merged.mul_(self.parameters.shared["lambda"])
            out[part] = merged.add_(block.base[part].to(merged.dtype))
        return out
