"""Ways to make one task vector tau of the low-rank delta_i (Algorithm 1, step 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Combine:
    """``tau = function(deltas, weights)``; a linear one may be applied in any coordinates."""

    function: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    linear: bool


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Optional 1: ``tau = sum_i w_i delta_i`` (the paper has w_i = 1)."""
    tau = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        tau.add_(delta, alpha=weight)
    return tau


def weighted_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``tau = sum_i w_i delta_i / sum_i w_i``; the weights must not sum to zero."""
    return weighted_sum(deltas, weights).div_(math.fsum(weights))


def elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Optional 2, TIES without trimming (Yadav et al. 2023), entry by entry.

    The sign of ``sum_i w_i delta_i`` is elected; tau is the weighted mean of the delta_i that have
    it. An entry with no sign, or whose agreeing weights sum to zero, is zero. (The paper writes
    the mean of tau over the agreeing models; the mean of their delta_i is meant.)
    """
    elected = weighted_sum(deltas, weights).sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() == elected).to(delta.dtype)
        total.add_(delta * agrees, alpha=weight)
        mass.add_(agrees, alpha=weight)
    empty = mass == 0
    return torch.where(empty, torch.zeros_like(total), total / mass.masked_fill(empty, 1.0))


COMBINE: dict[str, Combine] = {
    "sum": Combine(weighted_sum, linear=True),
    "mean": Combine(weighted_mean, linear=True),
    "ties": Combine(elected_mean, linear=False),
}
