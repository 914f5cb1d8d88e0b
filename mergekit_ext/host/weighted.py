"""F of NAN: combine the inputs of one group under given weights.

Any mergekit method with a per-model `weight` does. `ties` and `task_arithmetic` are computed from
pieces of the inputs instead, without sorting them and without a float32 copy of each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.base import MergeMethod, TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.kernels.numerics import compute_dtype
from mergekit_ext.kernels.task_arithmetic import add_task_vectors, weighted_sum
from mergekit_ext.kernels.threads import in_threads
from mergekit_ext.kernels.ties import TiesOptions, merge_ties

Weights = Mapping[Hashable, float]
# weighted(group, weights, scale, parameters, dtype) is W_0 + scale * F(weights; t), or without a
# base scale * F(weights; W).
Weighted = Callable[[TensorGroup, Weights, float, Mapping[str, Any], torch.dtype], Tensor]


def weighted_by(method: MergeMethod | None) -> Weighted:
    """Return the function that computes what `method` does; without one, weighted sums."""
    if method is None:
        return _summed
    return _by_ties(method) if in_pieces(method) else _called(method)


def in_pieces(method: MergeMethod | None) -> bool:
    """Return whether inputs are combined in pieces: sums, mergekit's TIES and task arithmetic."""
    return method is None or (
        type(method) is GeneralizedTaskArithmeticMerge
        and method.consensus_method in (None, ConsensusMethod.sum)
        and method.sparsification_method in (None, SparsificationMethod.magnitude)
    )


def _summed(
    group: TensorGroup,
    weights: Weights,
    scale: float,
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """Task arithmetic over a base; a weighted average without one."""
    tensors = [entry.tensor for entry in group.non_base]
    values = [weights[entry.id] for entry in group.non_base]
    if group.base is not None:
        scaled = [scale * value for value in values]
        return add_task_vectors(group.base.tensor, tensors, scaled, dtype)
    total = sum(values)
    if total == 0:
        raise MergeError(
            f"{group.metadata.name}: weights times coefficients sum to zero, so there is no "
            "average; expected a sum that is not zero. Change `weight`."
        )
    return weighted_sum(tensors, [scale * value / total for value in values], dtype)


def _by_ties(method: MergeMethod) -> Weighted:
    elect = method.consensus_method is not None
    trims = method.sparsification_method is not None

    def merge(
        group: TensorGroup,
        weights: Weights,
        scale: float,
        parameters: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> Tensor:
        entries = group.non_base
        return merge_ties(
            group.base.tensor,
            [entry.tensor for entry in entries],
            [weights[entry.id] for entry in entries],
            [parameters["density"][entry.id] if trims else 1.0 for entry in entries],
            TiesOptions(
                elect=elect,
                normalize=parameters["normalize"],
                rescale=parameters["rescale"],
                factor=scale * parameters["lambda"],
            ),
            dtype,
        )

    return merge


def _called(method: MergeMethod) -> Weighted:
    """Call the method in float32 (float64), whatever the dtype of the files.

    In half precision it would round every task vector and every weighted sum, and elect other
    signs.
    """
    names = tuple(p.name for p in method.spec.parameters if p.name != "weight")

    def merge(
        group: TensorGroup,
        weights: Weights,
        scale: float,
        parameters: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> Tensor:
        wide = compute_dtype(group.tensors)
        given = {**{name: parameters[name] for name in names}, "weight": dict(weights)}

        def call(group: TensorGroup) -> Tensor:
            (found,) = method((group,), parameters=given, dtype=wide)
            return found

        if isinstance(method, ExtMethod):
            merged = call(group)
        else:
            # By one thread: torch's own split sums, whose rounding then depends on their number.
            (merged,) = in_threads(call, [group], group.entries[0].tensor.device)
        if scale != 1:
            # Not through the weights: TIES and others divide by their sum.
            if group.base is None:
                merged = merged * scale
            else:
                merged = torch.lerp(group.base.tensor.to(wide), merged, scale)
        return merged.to(dtype)

    return merge
