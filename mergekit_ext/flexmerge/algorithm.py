"""F of FlexMerge: from the members' block vectors to one, by a declared method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.core.parameters import AUTO
from mergekit_ext.declared import Call, Method
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.calibration import calibrated, norms_of
from mergekit_ext.kernels.masks import pack_bits, reconstruct, unpack_bits
from mergekit_ext.kernels.numerics import compute_dtype, weighted_sum
from mergekit_ext.kernels.seeds import derived, drop_and_rescale
from mergekit_ext.kernels.selection import Cut, Keeper
from mergekit_ext.kernels.ties import cut_of

# For each task the cut that trims its whole model.
Cuts = Sequence[Cut]


@dataclass(frozen=True)
class Parameters:
    """An algorithm's parameters by name: the shared ones, and those of each task."""

    shared: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    trim_scope: str = "model"  # what `density` is a share of: "model", "block" or "tensor"
    seed: int = 0  # of all random numbers

    @property
    def options(self) -> Mapping[str, Any]:
        """Return the shared parameters with which a method is called: 1 for a factor `auto`."""
        return {n: 1.0 if value == AUTO else value for n, value in self.shared.items()}

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
    """A group that is stored as one vector and one mask for each member."""

    unified: Tensor  # the unified task vector, (n,)
    masks: Mapping[int, Tensor]  # for each member ceil(n/8) bytes; see `kernels.masks`
    rescale: Mapping[int, float]  # for each member the factor of its reconstruction

    def vector(self, base: Tensor, member: int) -> Tensor:
        """Return the block vector of one member, in the dtype of `unified`."""
        mask = unpack_bits(self.masks[member], self.unified.numel())
        return reconstruct(base, self.unified, mask, self.rescale[member], self.unified.dtype)


class Algorithm(ABC):
    """Merges the members of a group into one block vector.

    With the shared parameter ``dare_density``, task vectors are thinned and rescaled first (DARE,
    Yu et al. 2024). What is dropped depends on seed, block and task alone: not on the group, and
    not on what was merged before.
    """

    name: str
    trims = False  # task vectors to their largest entries
    masks = False  # groups from three on are stored as `Masked`
    kmeans = False  # groups are K-means clusters instead of a dendrogram's
    by_tensor = False  # the tensors of a block are merged one after the other
    orthogonal = False  # the parts of its inputs are made orthogonal to each other

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.cuts: Cuts | None = None  # with `densities`; set when models are measured
        self._thins: Any = parameters.shared.get("dare_density")

    @property
    def densities(self) -> list[float] | None:
        """For each task the share of its whole model that is kept; None if that is not asked."""
        if not self.trims or self.parameters.trim_scope != "model":
            return None
        return self.parameters.densities(range(len(self.parameters.models)))

    def copies(self, models: int, square: float) -> float:
        """Return how many copies of a block merging all models holds at once.

        Of a tensor if it merges `by_tensor`; arguments as for `memory.working`.
        """
        thinned = 0 if self._thins is None else 2 * models + 4
        return self._copies(models, square) + thinned + (AUTO in self.parameters.shared.values())

    def merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the merged weights, base included: (n,), rounded to `dtype` once.

        Raises:
            MergeError: the method refuses its parameters or these tensors.
        """
        if AUTO not in self.parameters.shared.values():
            return self._thin_merge(block, members, dtype)
        models = [block.models[member] for member in members]
        wide = self._thin_merge(block, members, compute_dtype([block.base, *models]))
        length, *norms = norms_of([wide, *models], block.base)
        return calibrated(wide, length, models, norms, block.base, dtype, self.orthogonal)[0]

    def _thin_merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._thins is None:
            return self._merge(block, members, dtype)
        relative = self._thinned(block, members)
        merged = self._merge(relative, members, relative.base.dtype)
        return merged.add_(block.base.to(merged.dtype)).to(dtype)

    def merge_masked(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Masked:
        """Return what is stored of a group of an algorithm with `masks`.

        Masks and factors are those of the vector before it is rounded.
        """
        raise NotImplementedError(f"{self.name} stores no masks")

    @abstractmethod
    def _copies(self, models: int, square: float) -> float: ...

    @abstractmethod
    def _merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor: ...

    def _thinned(self, block: BlockData, members: Sequence[int]) -> BlockData:
        """Return the members' thinned task vectors, over a base of zeros."""
        vectors = {}
        deltas = deltas_of(block, members)
        for member, delta in zip(members, deltas, strict=True):
            seed = derived(self.parameters.seed, block.layout.name, member)
            generator = torch.Generator().manual_seed(seed)
            vectors[member] = drop_and_rescale(delta, self._thins, generator)
        return BlockData(block.layout, torch.zeros_like(deltas[0]), vectors)


class Declared(Algorithm):
    """A declared method: over tensors, the scopes of trimming, or whole blocks."""

    def __init__(self, method: Method, parameters: Parameters):
        super().__init__(parameters)
        self.method, self.name = method, method.name
        self.trims, self.kmeans, self.by_tensor = method.trims, method.kmeans, method.matrices
        self.masks, self.orthogonal = method.mask is not None, method.orthogonal

    def _copies(self, models: int, square: float) -> float:
        if self.masks:  # task vectors, the unified one and the masks
            return models * 33 / 32 + 4
        if self.method.linear is not None or self.method.over_base is not None:
            return 0
        return self.method.copies(models, square)

    def _merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor:
        models = [block.models[member] for member in members]
        if self.method.linear is not None:
            scale = self.method.linear(self.parameters.weights(members), self.parameters.options)
            coefficients = [scale * weight for weight in self.parameters.weights(members)]
            return weighted_sum(models, coefficients, dtype, block.base)
        if self.method.over_base is not None and not self.masks:
            return self._over_base(block.layout, block.base, models, members, dtype)
        deltas = deltas_of(block, members)
        change = self._change(block, deltas, members)
        return change.add_(block.base.to(change.dtype)).to(dtype)

    def merge_masked(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Masked:
        mask, rescale = self.method.mask, self.method.rescale
        assert mask is not None
        block = block if self._thins is None else self._thinned(block, members)
        deltas = deltas_of(block, members)
        unified = self._change(block, deltas, members)
        pairs = list(zip(members, deltas, strict=True))
        options = self.parameters.options
        return Masked(
            unified.to(dtype),
            {member: pack_bits(mask(delta, unified, options)) for member, delta in pairs},
            {member: rescale(delta, unified) for member, delta in pairs},
        )

    def _change(self, block: BlockData, deltas: list[Tensor], members: Sequence[int]) -> Tensor:
        """Return the merged task vector; without masks, `deltas` are used up."""
        if self.method.over_base is not None:
            zeros = torch.zeros_like(deltas[0])
            return self._over_base(block.layout, zeros, deltas, members, zeros.dtype)
        call = self.call(members)
        if self.cuts is not None:
            for member, delta in zip(members, deltas, strict=True):
                Keeper(self.cuts[member]).drop(delta)
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
            merged = self.method.merge(tensors, replace(call, layout=part.layout)).tensor
            out[part.slice] = merged.reshape(-1)
        return out

    def _over_base(
        self,
        block: BlockLayout,
        base: Tensor,
        models: Sequence[Tensor],
        members: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        assert self.method.over_base is not None
        out = torch.empty_like(base, dtype=dtype)
        cuts = self.cuts
        kept = self.parameters.densities(members) if cuts is None else [cuts[m] for m in members]
        call = replace(self.call(members), kept=kept)
        for part in self.parameters.scopes(block):
            tensors = [model[part] for model in models]
            out[part] = self.method.over_base(base[part], tensors, call, dtype).tensor
        return out

    def call(self, members: Sequence[int]) -> Call:
        """Return what a merge of these members is done with."""
        each = [self.parameters.models[member] for member in members]
        return Call(self.parameters.weights(members), self.parameters.options, each)


def deltas_of(block: BlockData, members: Sequence[int]) -> list[Tensor]:
    """Return task vectors in float32 (float64 if an input is)."""
    dtype = compute_dtype([block.base, *block.models.values()])
    base = block.base.to(dtype)
    return [block.models[member].to(dtype) - base for member in members]


def trimmed_deltas(block: BlockData, algorithm: Algorithm) -> list[Tensor]:
    """Return the task vectors of all tasks, trimmed over the scope of an algorithm's parameters."""
    members = list(block.models)
    deltas, densities = deltas_of(block, members), algorithm.parameters.densities(members)
    for member, density, delta in zip(members, densities, deltas, strict=True):
        if algorithm.cuts is not None:
            Keeper(algorithm.cuts[member]).drop(delta)
            continue
        for part in algorithm.parameters.scopes(block.layout):
            Keeper(cut_of(delta[part], density)).drop(delta[part])
    return deltas
