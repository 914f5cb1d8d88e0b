"""F of NAN: combine the inputs of one group under given weights.

Any mergekit method with a per-model `weight` does. `ties` and `task_arithmetic` are computed from
pieces of the inputs instead, without sorting them and without a float32 copy of each.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.base import MergeMethod, TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.kernels.numerics import compute_dtype, weighted_sum
from mergekit_ext.kernels.threads import in_threads
from mergekit_ext.kernels.ties import TiesOptions, merge_ties


@dataclass(frozen=True)
class Weighted:
    """``W_0 + scale * F(weights; t)`` of one group, or without a base ``scale * F(weights; W)``.

    Attributes:
        group: the inputs.
        weights: of each model that counts, by its id.
        scale: multiplies what F returns.
        parameters: those of the group, as mergekit binds them.
        dtype: of the result.
    """

    group: TensorGroup
    weights: Mapping[Hashable, float]
    scale: float
    parameters: Mapping[str, Any]
    dtype: torch.dtype

    def by(self, method: MergeMethod | None) -> Tensor:
        """Return the result with `method` for F; None for weighted sums."""
        if method is None:
            return self._summed()
        return self._by_ties(method) if in_pieces(method) else self._called(method)

    def _summed(self) -> Tensor:
        """Task arithmetic over a base; a weighted average without one."""
        group = self.group
        tensors = [entry.tensor for entry in group.non_base]
        values = [self.weights[entry.id] for entry in group.non_base]
        if group.base is not None:
            scaled = [self.scale * value for value in values]
            return weighted_sum(tensors, scaled, self.dtype, group.base.tensor)
        total = sum(values)
        if total == 0:
            raise MergeError(
                f"{group.metadata.name}: weights times coefficients sum to zero, so there is no "
                "average; expected a sum that is not zero. Change `weight`."
            )
        return weighted_sum(tensors, [self.scale * value / total for value in values], self.dtype)

    def _by_ties(self, method: MergeMethod) -> Tensor:
        entries, parameters = self.group.non_base, self.parameters
        trims = method.sparsification_method is not None
        return merge_ties(
            self.group.base.tensor,
            [entry.tensor for entry in entries],
            [self.weights[entry.id] for entry in entries],
            [parameters["density"][entry.id] if trims else 1.0 for entry in entries],
            TiesOptions(
                elect=method.consensus_method is not None,
                normalize=parameters["normalize"],
                rescale=parameters["rescale"],
                factor=self.scale * parameters["lambda"],
            ),
            self.dtype,
        )

    def _called(self, method: MergeMethod) -> Tensor:
        """Call the method in float32 (float64), whatever the dtype of the files.

        In half precision it would round every task vector and every weighted sum, and elect other
        signs.
        """
        wide = compute_dtype(self.group.tensors)
        given = {p.name: self.parameters[p.name] for p in method.spec.parameters}
        given["weight"] = dict(self.weights)

        def call(group: TensorGroup) -> Tensor:
            (found,) = method((group,), parameters=given, dtype=wide)
            return found

        if isinstance(method, ExtMethod):
            merged = call(self.group)
        else:
            # By one thread: torch's own split sums, whose rounding then depends on their number.
            device = self.group.entries[0].tensor.device
            (merged,) = in_threads(call, [self.group], device)
        if self.scale != 1:
            # Not through the weights: TIES and others divide by their sum.
            if self.group.base is None:
                merged = merged * self.scale
            else:
                merged = torch.lerp(self.group.base.tensor.to(wide), merged, self.scale)
        return merged.to(self.dtype)


def in_pieces(method: MergeMethod | None) -> bool:
    """Return whether inputs are combined in pieces: sums, mergekit's TIES and task arithmetic."""
    return method is None or (
        type(method) is GeneralizedTaskArithmeticMerge
        and method.consensus_method in (None, ConsensusMethod.sum)
        and method.sparsification_method in (None, SparsificationMethod.magnitude)
    )
