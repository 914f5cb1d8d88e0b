"""LoRE-Merging of one parameter: an estimated base and low-rank task vectors.

The solver of the matrix problem is in `lore_outer`; here are the public function, what it accepts,
how tensors that are not matrices are seen, and how the task vectors are combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import norm, weighted_sum
from mergekit_ext.kernels.lore_fit import COMBINE, Fit, Shrinkage, fit
from mergekit_ext.kernels.lore_outer import UPDATES, Limits
from mergekit_ext.kernels.numerics import compute_dtype, count_non_finite

T = TypeVar("T")

DEFAULT_MAX_ITERATIONS = 200
DEFAULT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LoreResult:
    """What `lore` found. Every tensor has the shape of the inputs and the compute dtype.

    Attributes:
        merged: theta* = theta_0 + lam * tau.
        base: theta_0, estimated or given.
        iterations: evaluations of all thresholdings that were kept; 0 for averaged (1-D) tensors,
            1 for an explicit base.
        change: last relative change of theta_0 (see `lore`).
        objective: ``sum_i 1/2||theta_0 + delta_i - theta_i||_F^2 + mu||delta_i||_*`` (with
            `rank_ratio` without the second term) at the returned theta_0 and delta_i.
        converged: whether `tolerance` was reached within `max_iterations`.
        ranks: rank of each delta_i; for stacked experts the largest.
        spectral_norms: largest singular value of each theta_i - start, start being the mean of the
            models or the given base; for stacked experts the largest.
        mu: the absolute threshold; with `mu_relative` and stacked experts the largest of theirs;
            None with `rank_ratio`, and for averaged tensors unless it was given.
    """

    merged: Tensor
    base: Tensor
    iterations: int
    change: float
    objective: float
    converged: bool
    ranks: tuple[int, ...]
    spectral_norms: tuple[float, ...]
    mu: float | None


def lore(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    mu: float | None = None,
    mu_relative: float | None = None,
    rank_ratio: float | None = None,
    lam: float = 1.0,
    combine: str = "sum",
    weights: Sequence[float] | None = None,
    update: str = "simultaneous",
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
    tolerance: float = DEFAULT_TOLERANCE,
    layout: str = "matrix",
    on_iteration: Callable[[int, float, float], None] | None = None,
) -> LoreResult:
    """LoRE-Merging of one parameter (LoRE-Merging, section 3.2 and Algorithm 1).

    ``delta_i = 0``; repeat ``theta_0 = mean_i(theta_i - delta_i)``,
    ``delta_i = SVT(theta_i - theta_0; mu)``; then ``theta* = theta_0 + lam * tau``.

    *Objective.* These updates decrease ``sum_i 1/2||theta_0 + delta_i - theta_i||_F^2 +
    mu||delta_i||_*``; the paper's equation (1) has ``mu||delta_i||_*^2`` and no 1/2, for which
    they would not be the coordinate minimisers. The updates are what is implemented.

    *Departure from the paper.* With three or more models and a threshold, the same (there unique)
    minimiser is approached with quasi-Newton steps, each kept only if the objective does not
    rise. Returned are the thresholded delta_i and ``theta_0 = mean_i(theta_i - delta_i)`` of them.

    *Two models* and no base, simultaneous: ``delta_1 = -delta_2`` whatever the parameters, so that
    with equal weights theta* is the plain mean. At the fixed point ``lam = 1/n`` with "sum" (or
    ``lam = 1`` with "mean") is the plain mean for any number of models.

    Args:
        tensors: theta_i, one per model, of one shape. Half precision is upcast to float32;
            float64 (of any of them) makes the computation float64.
        base: theta_0 if it is known: kept, and each delta_i is one thresholding.
        mu: threshold for the singular values, absolute.
        mu_relative: threshold as a share of ``max_i sigma_1(theta_i - start)``, start being the
            mean or the base; for stacked experts each expert's own.
        rank_ratio: instead of a threshold, delta_i = best approximation of rank
            ``ceil(rank_ratio * min(a, b))``. Not convex: iterated as written, so that the result
            is that of Algorithm 1, and slow to converge when no gap separates the rank.
        lam: factor of the combined task vector.
        combine: "sum" (sum_i w_i delta_i), "mean" (that over sum_i w_i), "ties" (mean over the
            models that agree with the elected sign).
        weights: w_i, used in `combine` and in averages of vectors; 1 each if not given.
        update: "simultaneous" (Algorithm 1), or "sequential": theta_0 solved again after each
            delta_i, which depends on the order of the models.
        max_iterations: evaluations of all thresholdings (sweeps for "sequential").
        tolerance: for `change`, with the distance estimated to be left. Changes of less than eight
            units of rounding of the largest ``||theta_i - mean||_F`` count as none.
        layout: how tensors of more than two axes are seen: "stacked" (each matrix of the last two
            axes is a problem of its own: experts) or "flattened" (first axis against the rest:
            convolutions). One or no axis: the weighted average, whatever the base.
        on_iteration: called with (iteration, objective, change); for stacked experts the
            iterations start again with each. Iterations with rejected steps are not reported.

    `LoreResult.change` is ``||theta_0 - theta_0'||_F / ||theta_0 - mean||_F``: the last step of
    theta_0 (when a quasi-Newton iteration stops: the step that it would take next) over its
    distance from the mean of the models; 0 when theta_0 is the mean.

    Memory in units of one upcast tensor, n models: n differences, 2n for the delta_i of two
    iterates, at most 14 for the quasi-Newton history and scratch, one (short side)^2 matrix per
    model. In the smaller span if ``(n - 1) * short side`` is below the long side.

    Raises:
        ValueError: naming the parameter or ``tensors[i]``, what was found and what is expected:
            wrong value, not exactly one of mu, mu_relative and rank_ratio, differing shapes,
            integer dtype, non-finite entries.
    """
    shrinkage = Shrinkage.chosen(mu, mu_relative, rank_ratio)
    combination = _named("combine", combine, COMBINE)
    view = _named("layout", layout, LAYOUTS)
    _named("update", update, UPDATES)
    _check_numbers(lam, max_iterations, tolerance)
    _check_tensors(tensors, base)
    coefficients = _checked_weights(weights, len(tensors), combine)
    limits = Limits(max_iterations, tolerance, on_iteration)

    dtype = compute_dtype(tensors if base is None else [*tensors, base])
    shape = tensors[0].shape
    if len(shape) < 2:
        return _average([t.to(dtype) for t in tensors], coefficients, mu)
    stacks = [view(t) for t in tensors]
    given = None if base is None else view(base)
    if tensors[0].numel() == 0:
        return _empty(tensors[0].to(dtype), len(tensors), mu)
    results = []
    for slot in range(stacks[0].shape[0]):
        models = [s[slot].to(dtype) for s in stacks]
        fitted = fit(
            models, None if given is None else given[slot].to(dtype), shrinkage, update, limits
        )
        tau = fitted.task_vector(combination, coefficients)
        results.append(_result(fitted, fitted.base + lam * tau))
    return _gather(results, shape)


def _result(fitted: Fit, merged: Tensor) -> LoreResult:
    """The numbers of one matrix; its delta_i are let go."""
    return LoreResult(
        merged=merged,
        base=fitted.base,
        iterations=fitted.outcome.iterations,
        change=fitted.outcome.change,
        objective=fitted.objective,
        converged=fitted.outcome.converged,
        ranks=fitted.ranks,
        spectral_norms=fitted.spectral_norms,
        mu=fitted.mu,
    )


# --- layouts ----------------------------------------------------------------------------------


def _matrix(tensor: Tensor) -> Tensor:
    if tensor.ndim > 2:
        raise ValueError(
            f"layout: found 'matrix' for a tensor of shape {tuple(tensor.shape)}; expected "
            "'stacked' (matrices along the leading axes) or 'flattened' (first axis against the "
            "rest) for more than two axes"
        )
    return tensor[None]


def _stacked(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def _flattened(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, tensor.shape[0], math.prod(tensor.shape[1:]))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": _matrix,
    "stacked": _stacked,
    "flattened": _flattened,
}


# --- the rest ---------------------------------------------------------------------------------


def _average(models: list[Tensor], weights: list[float], mu: float | None) -> LoreResult:
    """Vectors and scalars: ``sum_i w_i theta_i / sum_i w_i``, exact for identical models."""
    total = math.fsum(weights)
    if total == 0.0:
        raise ValueError("weights: found a sum of 0; expected another sum to average 1-D tensors")
    shift = weighted_sum([m - models[0] for m in models], weights) / total
    mean = models[0] + shift
    apart = [norm((m - mean).double()) for m in models]
    return LoreResult(
        merged=mean,
        base=mean.clone(),
        iterations=0,
        change=0.0,
        objective=0.5 * math.fsum(d * d for d in apart),
        converged=True,
        ranks=(0,) * len(models),
        spectral_norms=tuple(apart),
        mu=mu,
    )


def _empty(tensor: Tensor, count: int, mu: float | None) -> LoreResult:
    return LoreResult(
        tensor.clone(), tensor.clone(), 0, 0.0, 0.0, True, (0,) * count, (0.0,) * count, mu
    )


def _gather(results: Sequence[LoreResult], shape: torch.Size) -> LoreResult:
    """One result from those of the matrices of a stack (mostly a stack of one)."""
    used = [r.mu for r in results if r.mu is not None]
    return LoreResult(
        merged=torch.stack([r.merged for r in results]).reshape(shape),
        base=torch.stack([r.base for r in results]).reshape(shape),
        iterations=max(r.iterations for r in results),
        change=max(r.change for r in results),
        objective=math.fsum(r.objective for r in results),
        converged=all(r.converged for r in results),
        ranks=tuple(max(r) for r in zip(*(r.ranks for r in results), strict=True)),
        spectral_norms=tuple(
            max(s) for s in zip(*(r.spectral_norms for r in results), strict=True)
        ),
        mu=max(used) if used else None,
    )


def _named(parameter: str, value: str, registry: Mapping[str, T]) -> T:
    if value not in registry:
        raise ValueError(f"{parameter}: found {value!r}; expected one of {', '.join(registry)}")
    return registry[value]


def _check_numbers(lam: float, max_iterations: int, tolerance: float) -> None:
    if not math.isfinite(lam):
        raise ValueError(f"lam: found {lam!r}; expected a finite number")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: found {max_iterations!r}; expected at least 1")
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: found {tolerance!r}; expected a finite number >= 0")


def _checked_weights(weights: Sequence[float] | None, count: int, combine: str) -> list[float]:
    if weights is None:
        return [1.0] * count
    checked = [float(w) for w in weights]
    if len(checked) != count:
        raise ValueError(f"weights: found {len(checked)} values; expected {count}, one per model")
    if not all(math.isfinite(w) for w in checked):
        raise ValueError(f"weights: found {checked}; expected finite numbers")
    if combine == "mean" and math.fsum(checked) == 0.0:
        raise ValueError("weights: found a sum of 0; expected another sum with combine='mean'")
    return checked


def _check_tensors(tensors: Sequence[Tensor], base: Tensor | None) -> None:
    if not tensors:
        raise ValueError("tensors: found none; expected at least one model")
    shape = tensors[0].shape
    for name, tensor in [*((f"tensors[{i}]", t) for i, t in enumerate(tensors)), ("base", base)]:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: found shape {tuple(tensor.shape)}; expected {tuple(shape)}, that of "
                "tensors[0]"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: found dtype {tensor.dtype}; expected a floating type")
        # one pass; finite entries can only overflow the float64 sum if they are float64
        if not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            bad = count_non_finite(tensor)
            if bad:
                raise ValueError(
                    f"{name}: found {bad} non-finite values among {tensor.numel()}; expected "
                    "finite weights"
                )
