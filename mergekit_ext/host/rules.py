"""How NAN's coefficients are put to use: its own two rules, and any mergekit method.

A rule combines the inputs of one group under given weights. It returns the merged tensor in
float32 (float64 for float64 inputs) before NAN's global factor is applied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from mergekit.merge_methods.base import MergeMethod, TensorGroup
from torch import Tensor

from mergekit_ext.kernels.numerics import compute_dtype
from mergekit_ext.kernels.task_arithmetic import add_task_vectors, weighted_sum


class Rule(ABC):
    """Combine the inputs of a group under per-input weights."""

    @abstractmethod
    def merge(
        self,
        group: TensorGroup,
        weights: Mapping[Hashable, float],
        scale: float,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Return ``W_0 + scale * F(weights; t)``, or ``scale * F(weights; W)`` without a base."""


class DirectRule(Rule):
    """Task arithmetic over a base; a weighted average without one."""

    def merge(
        self,
        group: TensorGroup,
        weights: Mapping[Hashable, float],
        scale: float,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> Tensor:
        tensors = [entry.tensor for entry in group.non_base]
        values = [weights[entry.id] for entry in group.non_base]
        if group.base is not None:
            scaled = [scale * value for value in values]
            return add_task_vectors(group.base.tensor, tensors, scaled, out_dtype)
        total = sum(values)
        if total == 0:
            raise ValueError(
                f"{group.metadata.name}: weights times coefficients sum to zero, so there is no "
                "average; expected a sum that is not zero. Change `weight`."
            )
        return weighted_sum(tensors, [scale * value / total for value in values], out_dtype)


class WrappedRule(Rule):
    """Any mergekit method with a per-model `weight`.

    The method computes in float32 (float64) whatever the dtype of the files: in half precision it
    would round every task vector and every weighted sum, and elect other signs.
    """

    def __init__(self, method: MergeMethod):
        self._method = method
        self._names = tuple(p.name for p in method.spec.parameters if p.name != "weight")

    def merge(
        self,
        group: TensorGroup,
        weights: Mapping[Hashable, float],
        scale: float,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> Tensor:
        dtype = compute_dtype(group.tensors)
        arguments = {name: parameters[name] for name in self._names}
        (merged,) = self._method(
            (group,), parameters={**arguments, "weight": dict(weights)}, dtype=dtype
        )
        if scale != 1:
            # Not through the weights: TIES and others divide by their sum.
            if group.base is None:
                merged = merged * scale
            else:
                base = group.base.tensor.to(dtype)
                merged = torch.lerp(base, merged, scale)
        return merged.to(out_dtype)
