"""F of FlexMerge: from the members' block vectors to one, by a declared method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.masks import pack_bits, reconstruct, unpack_bits
from mergekit_ext.kernels.numerics import compute_dtype, weighted_sum
from mergekit_ext.kernels.seeds import derived, drop_and_rescale
from mergekit_ext.kernels.selection import Cut, Keeper
from mergekit_ext.kernels.ties import cut_of
from mergekit_ext.methods import Call, Method

# For each task the cut that trims its whole model.
Cuts = Sequence[Cut]


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

    def weights(self, members: Sequence[int]) -> list[float]:
        """Return the members' weights; 1 for a method that has none."""
        return [self.models[member].get("weight", 1.0) for member in members]

    def densities(self, members: Sequence[int]) -> list[float]:
        """Return the share of each member's entries that trimming keeps."""
        shared = self.shared.get("density")
        return [self.models[member].get("density", shared) for member in members]

    def scopes(self, block: BlockLayout) -> list[slice]:
        """Return what of a block vector `density` is a share of, if not of a whole model."""
        return [p.slice for p in block.parts] if self.trim_scope == "tensor" else [slice(None)]


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
        """Return the block vector of one member, in the dtype of `unified`."""
        mask = unpack_bits(self.masks[member], self.unified.numel())
        return reconstruct(base, self.unified, mask, self.rescale[member], self.unified.dtype)


class Algorithm(ABC):
    """Merges the members of a group into one block vector.

    Attributes:
        name: as in YAML.
        parameters: those of this merge.
        trims: whether it trims task vectors to their largest entries.
        masks: whether groups from three on are stored as `Masked`.
        kmeans: whether groups are K-means clusters instead of a dendrogram's.
        by_tensor: whether the tensors of a block are merged one after the other.
    """

    name: str
    trims = False
    masks = False
    kmeans = False
    by_tensor = False

    def __init__(self, parameters: Parameters):
        self.parameters = parameters

    @property
    def densities(self) -> list[float] | None:
        """For each task the share of its whole model that is kept; None if that is not asked."""
        if not self.trims or self.parameters.trim_scope != "model":
            return None
        return self.parameters.densities(range(len(self.parameters.models)))

    @abstractmethod
    def copies(self, models: int, square: float) -> float:
        """Return how many copies of a block merging all models holds at once.

        Of a tensor if it merges `by_tensor`; arguments as for `memory.working`.
        """

    @abstractmethod
    def merge(
        self, block: BlockData, members: Sequence[int], dtype: torch.dtype, cuts: Cuts | None = None
    ) -> Tensor:
        """Return the merged weights, base included: (n,), in `dtype`.

        Args:
            block: the original vectors of all tasks.
            members: two tasks or more.
            dtype: of the result, rounded to once.
            cuts: with `trims` and the scope ``model``, what is kept of each task's model.
        """

    def merge_masked(
        self, block: BlockData, members: Sequence[int], dtype: torch.dtype, cuts: Cuts | None = None
    ) -> Masked:
        """Return what is stored of a group of an algorithm with `masks`. Arguments as above."""
        raise NotImplementedError(f"{self.name} stores no masks")


class Declared(Algorithm):
    """A method of `mergekit_ext.methods`: over tensors, the scopes of trimming, or whole blocks."""

    def __init__(self, method: Method, parameters: Parameters):
        super().__init__(parameters)
        self.method, self.name = method, method.name
        self.trims, self.kmeans, self.by_tensor = method.trims, method.kmeans, method.matrices
        self.masks = method.mask is not None

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: with masks, task vectors, the unified one and the masks."""
        if self.masks:
            return models * 33 / 32 + 4
        if self.method.linear is not None or self.method.over_base is not None:
            return 0
        return self.method.copies(models, square)

    def merge(
        self, block: BlockData, members: Sequence[int], dtype: torch.dtype, cuts: Cuts | None = None
    ) -> Tensor:
        """See `Algorithm.merge`."""
        models = [block.models[member] for member in members]
        if self.method.linear is not None:
            scale = self.method.linear(self.parameters.weights(members), self.parameters.shared)
            coefficients = [scale * weight for weight in self.parameters.weights(members)]
            return weighted_sum(models, coefficients, dtype, block.base)
        if self.method.over_base is not None and not self.masks:
            return self._over_base(block.layout, block.base, models, members, cuts, dtype)
        deltas = deltas_of(block, members)
        change = self._change(block, deltas, members, cuts)
        return change.add_(block.base.to(change.dtype)).to(dtype)

    def merge_masked(
        self, block: BlockData, members: Sequence[int], dtype: torch.dtype, cuts: Cuts | None = None
    ) -> Masked:
        """See `Algorithm.merge_masked`. Masks and factors are those of the unrounded vector."""
        mask, rescale = self.method.mask, self.method.rescale
        assert mask is not None
        deltas = deltas_of(block, members)
        unified = self._change(block, deltas, members, cuts)
        pairs = list(zip(members, deltas, strict=True))
        options = self.parameters.shared
        return Masked(
            unified.to(dtype),
            {member: pack_bits(mask(delta, unified, options)) for member, delta in pairs},
            {member: rescale(delta, unified) for member, delta in pairs},
        )

    def _change(
        self, block: BlockData, deltas: list[Tensor], members: Sequence[int], cuts: Cuts | None
    ) -> Tensor:
        """Return the merged task vector; without masks, `deltas` are used up."""
        if self.method.over_base is not None:
            zeros = torch.zeros_like(deltas[0])
            return self._over_base(block.layout, zeros, deltas, members, cuts, zeros.dtype)
        call = self._call(members)
        if cuts is not None and self.trims:
            for member, delta in zip(members, deltas, strict=True):
                Keeper(cuts[member]).drop(delta)
            call = replace(call, options={**call.options, "density": 1.0})
        if not self.method.weighs:
            for weight, delta in zip(call.weights, deltas, strict=True):
                if weight != 1:
                    delta.mul_(weight)
        if not self.by_tensor:
            found = [
                self.method.merge([delta[part] for delta in deltas], call).tensor
                for part in self.parameters.scopes(block.layout)
            ]
            return torch.cat(found) if len(found) > 1 else found[0]
        out = torch.empty_like(deltas[0])
        for index, part in enumerate(block.layout.parts):
            tensors = [block.part(delta, index) for delta in deltas]
            merged = self.method.merge(tensors, replace(call, layout=part.matrices)).tensor
            out[part.slice] = merged.reshape(-1)
        return out

    def _over_base(
        self,
        block: BlockLayout,
        base: Tensor,
        models: Sequence[Tensor],
        members: Sequence[int],
        cuts: Cuts | None,
        dtype: torch.dtype,
    ) -> Tensor:
        assert self.method.over_base is not None
        out = torch.empty_like(base, dtype=dtype)
        kept = self.parameters.densities(members) if cuts is None else [cuts[m] for m in members]
        call = replace(self._call(members), kept=kept)
        for part in self.parameters.scopes(block):
            tensors = [model[part] for model in models]
            out[part] = self.method.over_base(base[part], tensors, call, dtype).tensor
        return out

    def _call(self, members: Sequence[int]) -> Call:
        each = [self.parameters.models[member] for member in members]
        return Call(self.parameters.weights(members), self.parameters.shared, each)


class Dare(Algorithm):
    """DARE in front of any algorithm (Yu et al. 2024): task vectors are thinned and rescaled.

    What is dropped depends on seed, block and task alone: not on the group, and not on what was
    merged before.
    """

    def __init__(self, inner: Algorithm, density: float, seed: int):
        super().__init__(inner.parameters)
        self._inner, self._density, self._seed = inner, density, seed
        self.name, self.trims, self.by_tensor = inner.name, inner.trims, inner.by_tensor
        self.masks, self.kmeans = inner.masks, inner.kmeans

    def copies(self, models: int, square: float) -> float:
        """See `Algorithm.copies`: thinned task vectors beside the first."""
        return self._inner.copies(models, square) + 2 * models + 4

    def merge(
        self, block: BlockData, members: Sequence[int], dtype: torch.dtype, cuts: Cuts | None = None
    ) -> Tensor:
        """See `Algorithm.merge`."""
        relative = self._thinned(block, members)
        merged = self._inner.merge(relative, members, relative.base.dtype, cuts)
        return merged.add_(block.base.to(merged.dtype)).to(dtype)

    def merge_masked(
        self, block: BlockData, members: Sequence[int], dtype: torch.dtype, cuts: Cuts | None = None
    ) -> Masked:
        """See `Algorithm.merge_masked`."""
        return self._inner.merge_masked(self._thinned(block, members), members, dtype, cuts)

    def _thinned(self, block: BlockData, members: Sequence[int]) -> BlockData:
        """Return the members' thinned task vectors, over a base of zeros."""
        vectors = {}
        deltas = deltas_of(block, members)
        for member, delta in zip(members, deltas, strict=True):
            seed = derived(self._seed, block.layout.name, member)
            generator = torch.Generator().manual_seed(seed)
            vectors[member] = drop_and_rescale(delta, self._density, generator)
        return BlockData(block.layout, torch.zeros_like(deltas[0]), vectors)


def deltas_of(block: BlockData, members: Sequence[int]) -> list[Tensor]:
    """Return task vectors in float32 (float64 if an input is)."""
    dtype = compute_dtype([block.base, *block.models.values()])
    base = block.base.to(dtype)
    return [block.models[member].to(dtype) - base for member in members]


def trimmed_deltas(
    block: BlockData, members: Sequence[int], parameters: Parameters, cuts: Cuts | None
) -> list[Tensor]:
    """Return the members' task vectors, trimmed over the scope of an algorithm's parameters."""
    deltas = deltas_of(block, members)
    for member, density, delta in zip(members, parameters.densities(members), deltas, strict=True):
        if cuts is not None:
            Keeper(cuts[member]).drop(delta)
            continue
        for part in parameters.scopes(block.layout):
            Keeper(cut_of(delta[part], density)).drop(delta[part])
    return deltas
