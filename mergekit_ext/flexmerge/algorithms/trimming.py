"""TIES and PCB: algorithms that trim task vectors first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def ties_over(
    scope: str,
    block: BlockData,
    members: Sequence[int],
    algorithm: Algorithm,
    factor: float,
    dtype: torch.dtype,
    cuts: Cuts | None,
) -> Tensor:
    """TIES with the algorithm's weights and densities, trimmed over `scope`."""
    return _SCOPES[scope](block, members, algorithm, TiesOptions(factor=factor), dtype, cuts)


def _ties_block(
    block: BlockData,
    members: Sequence[int],
    algorithm: Algorithm,
    options: TiesOptions,
    dtype: torch.dtype,
    cuts: Cuts | None,
) -> Tensor:
    densities = algorithm.parameters.each("density", members)
    return merge_ties(
        block.base,
        [block.models[member] for member in members],
        algorithm.parameters.each("weight", members),
        densities if cuts is None else [cuts[member] for member in members],
        options,
        dtype,
    )


def _ties_tensors(
    block: BlockData,
    members: Sequence[int],
    algorithm: Algorithm,
    options: TiesOptions,
    dtype: torch.dtype,
    cuts: Cuts | None,
) -> Tensor:
    out = torch.empty_like(block.base, dtype=dtype)
    for part in block.layout.parts:
        models = {member: model[part.slice] for member, model in block.models.items()}
        piece = BlockData(block.layout, block.base[part.slice], models)
        out[part.slice] = _ties_block(piece, members, algorithm, options, dtype, None)
    return out


# With the scope "model" the cuts are given.
_SCOPES: Mapping[str, Callable[..., Tensor]] = {
    "model": _ties_block,
    "block": _ties_block,
    "tensor": _ties_tensors,
}


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
        by_tensor = algorithm.parameters.trim_scope == "tensor"
        slices = [part.slice for part in block.layout.parts] if by_tensor else [slice(None)]
        for part in slices:
            Keeper(cut_of(delta[part], density)).drop(delta[part])
    return deltas


class Ties(Algorithm):
    """Yadav et al., "TIES-Merging", section 3: trim, elect signs, average what agrees."""

    name: ClassVar[str] = "ties"
    options: ClassVar[tuple[Option, ...]] = (SCALE, DENSITY, WEIGHT)
    trims: ClassVar[bool] = True

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """See `kernels.ties.merge_ties` and `Algorithm.merge`."""
        factor = self.parameters.shared["lambda"]
        scope = self.parameters.trim_scope
        return ties_over(scope, block, members, self, factor, dtype, cuts)


class Pcb(Algorithm):
    """Du et al. 2024, "PCB-Merging": see `kernels.pcb.pcb_merge`.

    With the scope ``model`` task vectors are trimmed over the whole model, as for TIES, and
    compete in the block with what is left; the drop of PCB itself then keeps everything. With
    ``block`` the drop of PCB is the only one, as in its paper. ``tensor``: the same by tensor.
    """

    name: ClassVar[str] = "pcb"
    options: ClassVar[tuple[Option, ...]] = (
        SCALE,
        Option("density", Share, 0.1, "share of the entries that are kept"),
        WEIGHT,
    )
    trims: ClassVar[bool] = True

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
        slices = [slice(None)]
        if self.parameters.trim_scope == "tensor":
            slices = [part.slice for part in block.layout.parts]
        out = torch.empty_like(block.base, dtype=dtype)
        for part in slices:
            (merged,) = pcb_merge([[delta[part]] for delta in deltas], density, DEFAULT_CLIP)
            merged.mul_(self.parameters.shared["lambda"])
            out[part] = merged.add_(block.base[part].to(merged.dtype))
        return out
