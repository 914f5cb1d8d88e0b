"""F of NAN: combine the inputs of one group under given weights.

`ties` and `task_arithmetic` are computed from pieces of the inputs, without sorting them or copying
each to float32; any other method with a per-model `weight` is called.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
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


def weighted(
    method: MergeMethod | None,
    group: TensorGroup,
    weights: Mapping[Hashable, float],
    scale: float,
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """Return ``W_0 + scale * F(weights; t)``, or without a base ``scale * F(weights; W)``.

    F is `method`, called with the group's bound `parameters`; None for weighted sums.
    """
    if method is None:
        return _summed(group, weights, scale, dtype)
    if in_pieces(method):
        entries, trims = group.non_base, method.sparsification_method is not None
        return merge_ties(
            group.base.tensor,
            [entry.tensor for entry in entries],
            [weights[entry.id] for entry in entries],
            [parameters["density"][entry.id] if trims else 1.0 for entry in entries],
            TiesOptions(
                elect=method.consensus_method is not None,
                normalize=parameters["normalize"],
                rescale=parameters["rescale"],
                factor=scale * parameters["lambda"],
            ),
            dtype,
        )
    given = {p.name: parameters[p.name] for p in method.spec.parameters}
    merged = _called(method, group, {**given, "weight": dict(weights)})
    if scale != 1:
        # Not through the weights: TIES and others divide by their sum.
        if group.base is None:
            merged = merged * scale
        else:
            merged = torch.lerp(group.base.tensor.to(merged.dtype), merged, scale)
    return merged.to(dtype)


def in_pieces(method: MergeMethod | None) -> bool:
    """Return whether inputs are combined in pieces: sums, mergekit's TIES and task arithmetic."""
    return method is None or (
        type(method) is GeneralizedTaskArithmeticMerge
        and method.consensus_method in (None, ConsensusMethod.sum)
        and method.sparsification_method in (None, SparsificationMethod.magnitude)
    )


def _summed(
    group: TensorGroup, weights: Mapping[Hashable, float], scale: float, dtype: torch.dtype
) -> Tensor:
    """Return task arithmetic over a base, or else a weighted average."""
    tensors = [entry.tensor for entry in group.non_base]
    values = [weights[entry.id] for entry in group.non_base]
    if group.base is not None:
        scaled = [scale * value for value in values]
        return weighted_sum(tensors, scaled, dtype, group.base.tensor)
    total = sum(values)
    if total == 0:
        raise MergeError(
            f"{group.metadata.name}: weights times coefficients sum to zero, so there is no "
            "average; expected a sum that is not zero. Change `weight`."
        )
    return weighted_sum(tensors, [scale * value / total for value in values], dtype)


def _called(method: MergeMethod, group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
    """Call a method in float32 (float64), whatever the dtype of the files.

    In half precision it would round every task vector and sum, and elect other signs.
    """

    def call(group: TensorGroup) -> Tensor:
        (found,) = method((group,), parameters=parameters, dtype=compute_dtype(group.tensors))
        return found

    if isinstance(method, ExtMethod):
        return call(group)
    # By one thread: torch's own split sums, whose rounding then depends on their number.
    (merged,) = in_threads(call, [group], group.entries[0].tensor.device)
    return merged
