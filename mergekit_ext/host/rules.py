"""How NAN's coefficients are put to use.

A rule combines the inputs of one group under given weights. Any mergekit method is one
(`WrappedRule`); `ties` and `task_arithmetic` have their own, which computes the same from pieces
of the inputs, without sorting them and without a float32 copy of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.base import MergeMethod, TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_ext.errors import MergeError, Problem
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.kernels.numerics import compute_dtype
from mergekit_ext.kernels.task_arithmetic import add_task_vectors, weighted_sum
from mergekit_ext.kernels.threads import in_threads
from mergekit_ext.kernels.ties import TiesOptions, merge_ties
from mergekit_ext.memory import copies_of
from mergekit_ext.methods.sparsify import spread_problems


class Rule(ABC):
    """Combine the inputs of a group under per-input weights.

    Attributes:
        linear: whether F is a plain weighted sum over a base, no longer than the sum of its terms.
    """

    linear: ClassVar[bool] = False

    def problems(self, values: Mapping[str, Any]) -> Iterable[Problem]:
        """See `ExtMethod.input_problems`."""
        return ()

    def copies(self, models: int, square: float) -> float:
        """See `ExtMethod.copies`; none where inputs are combined in pieces."""
        return 0

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

    linear = True

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
            raise MergeError(
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

    def copies(self, models: int, square: float) -> float:
        """Those of the method, its result in float32, and the base and the result, scaled."""
        return copies_of(self._method)(models, square) + 3

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

        def call(group: TensorGroup) -> Tensor:
            given = {**arguments, "weight": dict(weights)}
            (found,) = self._method((group,), parameters=given, dtype=dtype)
            return found

        if isinstance(self._method, ExtMethod):
            merged = call(group)
        else:
            # By one thread: torch's own split sums, whose rounding then depends on their number.
            (merged,) = in_threads(call, [group], group.entries[0].tensor.device)
        if scale != 1:
            # Not through the weights: TIES and others divide by their sum.
            if group.base is None:
                merged = merged * scale
            else:
                base = group.base.tensor.to(dtype)
                merged = torch.lerp(base, merged, scale)
        return merged.to(out_dtype)


class DellaRule(WrappedRule):
    """mergekit's `della` and `della_linear`, which stop in the middle of a merge if the range of
    shares that they keep, ``density - epsilon`` to ``density + epsilon``, is not within (0, 1)."""

    @staticmethod
    def computes(method: MergeMethod) -> bool:
        """Whether `method` is one of the two."""
        return (
            isinstance(method, GeneralizedTaskArithmeticMerge)
            and method.sparsification_method == SparsificationMethod.della_magprune
        )

    def problems(self, values: Mapping[str, Any]) -> Iterable[Problem]:
        """A density too near to 0 or 1; at 1 itself everything is kept."""
        return spread_problems(values) if {"density", "epsilon"} <= values.keys() else ()


class TiesRule(Rule):
    """mergekit's `ties` and `task_arithmetic`, with the parameters they have there."""

    def __init__(self, method: GeneralizedTaskArithmeticMerge):
        self._elect = method.consensus_method is not None
        self._trims = method.sparsification_method is not None

    @staticmethod
    def computes(method: MergeMethod) -> bool:
        """Whether this rule gives the same as `method`."""
        return (
            type(method) is GeneralizedTaskArithmeticMerge
            and method.consensus_method in (None, ConsensusMethod.sum)
            and method.sparsification_method in (None, SparsificationMethod.magnitude)
        )

    def merge(
        self,
        group: TensorGroup,
        weights: Mapping[Hashable, float],
        scale: float,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
    ) -> Tensor:
        entries = group.non_base
        options = TiesOptions(
            elect=self._elect,
            normalize=parameters["normalize"],
            rescale=parameters["rescale"],
            factor=scale * parameters["lambda"],
        )
        return merge_ties(
            group.base.tensor,
            [entry.tensor for entry in entries],
            [weights[entry.id] for entry in entries],
            [parameters["density"][entry.id] if self._trims else 1.0 for entry in entries],
            options,
            out_dtype,
        )


_RULES: tuple[tuple[Callable[[MergeMethod], bool], Callable[[Any], Rule]], ...] = (
    (TiesRule.computes, TiesRule),
    (DellaRule.computes, DellaRule),
    (lambda method: True, WrappedRule),
)


def rule_for(method: MergeMethod) -> Rule:
    """The rule that computes what `method` computes."""
    return next(make(method) for computes, make in _RULES if computes(method))
