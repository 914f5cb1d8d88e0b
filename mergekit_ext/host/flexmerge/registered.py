"""Any registered merge method as FlexMerge's F."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, Parameters
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.host.nan_method import NanMethod
from mergekit_ext.kernels.numerics import compute_dtype


class Registered(Algorithm):
    """A mergekit method, called with all tensors of a block at once.

    It computes in float32 at least and is rounded once. NAN measures the block as a whole.
    """

    def __init__(
        self, method: MergeMethod, parameters: Parameters, specs: Mapping[str, ParameterSpec]
    ):
        super().__init__(parameters)
        self._method, self._specs = method, specs
        self._based = method.spec.contract.base != BasePolicy.IGNORED
        self.__dict__["name"] = method.spec.name

    def merge(
        self,
        block: BlockData,
        members: Sequence[int],
        dtype: torch.dtype,
        cuts: Cuts | None = None,
    ) -> Tensor:
        """See `Algorithm.merge`."""
        wide = compute_dtype([block.base, *block.models.values()])
        groups = [self._group(block, members, i) for i in range(len(block.layout.parts))]
        merged = self._method(groups, parameters=self._bound(members), dtype=wide)
        out = torch.empty_like(block.base, dtype=dtype)
        for part, tensor in zip(block.layout.parts, merged, strict=True):
            out[part.slice] = tensor.reshape(-1)
        return out

    def _group(self, block: BlockData, members: Sequence[int], index: int) -> TensorGroup:
        entries = [
            TensorEntry(id=member, tensor=block.part(block.models[member], index), is_base=False)
            for member in members
        ]
        if self._based:
            base = TensorEntry(id="base", tensor=block.part(block.base, index), is_base=True)
            entries.insert(0, base)
        name = block.layout.parts[index].name
        return TensorGroup(entries=tuple(entries), metadata=TensorMetadata(name=name))

    def _bound(self, members: Sequence[int]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, spec in self._specs.items():
            if spec.scope == ParameterScope.SHARED:
                found[name] = self.parameters.shared[name]
            else:
                each: dict[Any, Any] = dict(
                    zip(members, self.parameters.each(name, members), strict=True)
                )
                if spec.scope != ParameterScope.NON_BASE and self._based:
                    each["base"] = spec.default if not spec.required else 0.0
                found[name] = each
        if isinstance(self._method, NanMethod):
            # Of this call, that is; by its own "block" NAN would go by the tensors' names.
            found["granularity"] = "model"
        return found
