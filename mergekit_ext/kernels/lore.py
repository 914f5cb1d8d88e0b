"""LoRE-Merging of one parameter: an estimated base and low-rank task vectors.

Each matrix of the models becomes a problem of `lore_solver`: the differences from the mean, in
coordinates, and a rule by which they are shrunk.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import matrices_of, norm
from mergekit_ext.kernels.lore_solver import (
    UPDATES,
    Limits,
    Outcome,
    Problem,
    over_base,
    shrinker_for,
)
from mergekit_ext.kernels.lore_span import Span
from mergekit_ext.kernels.numerics import compute_dtype, require_alike, weighted_sum
from mergekit_ext.kernels.svt import Rule

DEFAULT_MAX_ITERATIONS = 200
# Without a tolerance, the error may be this share of the rounding of the output, or of the distance
# of theta_0 from the mean if that is more, since float32 arithmetic gives no more.
ROUNDING_SHARE, LEAST_TOLERANCE = 0.1, 1e-5
# An output in the compute dtype may have so many times the error that rounding on the way causes.
REACH = 16.0
# Root mean square of rounding, in eps of a dtype, of entries whose mantissas are spread evenly.
ROUNDING = 0.21


@dataclass(frozen=True)
class LoreResult:
    """What `lore` found. Tensors have the shape of the inputs.

    Attributes:
        merged: theta* = theta_0 + lam * tau, in the compute dtype.
        base: theta_0, estimated (in the compute dtype) or as it was given.
        iterations: evaluations of all thresholdings; 0 for averaged (1-D) tensors, 1 for an
            explicit base.
        change: last relative change of theta_0: ``||theta_0 - theta_0'||_F / ||theta_0 - mean||_F``
        objective: at the returned theta_0 and delta_i; with `rank_ratio` without its second term.
        converged: whether the error that is estimated to be left was small enough within
            `max_iterations`; not if it could not be estimated.
        ranks: rank of each delta_i. This, the norms and mu are the largest of stacked experts.
        spectral_norms: largest singular value of each theta_i minus the mean or the given base.
        thresholds: mu of each matrix; none with `rank_ratio`, and of averaged tensors.
    """

    merged: Tensor
    base: Tensor
    iterations: int
    change: float
    objective: float
    converged: bool
    ranks: tuple[int, ...]
    spectral_norms: tuple[float, ...]
    thresholds: tuple[float, ...]

    @property
    def mu(self) -> float | None:
        """The absolute threshold, the largest of stacked experts."""
        return max(self.thresholds, default=None)


def lore(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    mu: float | Sequence[float] | None = None,
    mu_relative: float | None = None,
    rank_ratio: float | None = None,
    lam: float = 1.0,
    combine: str = "sum",
    weights: Sequence[float] | None = None,
    update: str = "simultaneous",
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
    tolerance: float | None = None,
    output: torch.dtype | None = None,
    calibrated: bool = False,
    layout: str = "matrix",
    on_iteration: Callable[[int, float, float], None] | None = None,
) -> LoreResult:
    """Merge one parameter by LoRE-Merging (section 3.2 and Algorithm 1).

    ``delta_i = 0``; repeat ``theta_0 = mean_i(theta_i - delta_i)``,
    ``delta_i = SVT(theta_i - theta_0; mu)``; then ``theta* = theta_0 + lam * tau``.

    *Objective.* These updates decrease ``sum_i 1/2||theta_0 + delta_i - theta_i||_F^2 +
    mu||delta_i||_*``; the paper's equation (1) has ``mu||delta_i||_*^2`` and no 1/2.

    *Departure from the paper.* With three or more models and a threshold, the same (there unique)
    minimiser is approached with accelerated proximal steps (`lore_solver.accelerated`), on the way
    of which the objective may rise. Returned are the thresholded delta_i and ``theta_0 =
    mean_i(theta_i - delta_i)`` of them.

    *Two models* and no base, simultaneous: ``delta_1 = -delta_2`` whatever the parameters, so that
    with equal weights theta* is the plain mean; so it is at the fixed point for ``lam = 1/n``.

    Args:
        tensors: theta_i, one per model, of one shape. Half precision is upcast to float32;
            float64 (of any of them) makes the computation float64.
        base: theta_0 if it is known: kept, and each delta_i is one thresholding.
        mu: threshold for the singular values, absolute, or one for each matrix. Of `mu`,
            `mu_relative` and `rank_ratio` exactly one is given.
        mu_relative: threshold as a share of ``max_i sigma_1(theta_i - start)``, start being the
            mean or the base; for stacked experts each expert's own.
        rank_ratio: instead of a threshold, delta_i = best approximation of rank
            ``ceil(rank_ratio * min(a, b))``. Not convex: iterated as Algorithm 1 has it.
        lam: factor of the combined task vector.
        combine: tau: "sum" (sum_i w_i delta_i), "mean" (that over sum_i w_i), "ties" (mean over
            the models that agree with the elected sign).
        weights: w_i, used in `combine` and in averages of vectors; 1 each if not given.
        update: "simultaneous" (Algorithm 1), or "sequential": theta_0 solved again after each
            delta_i, which depends on the order of the models.
        max_iterations: evaluations of all thresholdings (sweeps for "sequential").
        tolerance: for the error of theta_0 that is estimated to be left, relative to its distance
            from the mean, but no less than eight units of rounding of the largest ``||theta_i -
            mean||_F``. If not given, the error of the merged tensor may be a tenth of its rounding
            to `output`, or that of theta_0 1e-5 of its distance if that is more; with an `output`
            in the compute dtype also `REACH` times what rounding on the way causes.
        output: the dtype to which `LoreResult.merged` will be cast; by default the compute dtype.
        calibrated: whether ``merged - base`` will be brought to about the length of
            ``theta_i - base`` before.
        layout: see `matrices_of`; each matrix is a problem of its own. One or no axis: the
            weighted average, whatever the base.
        on_iteration: called with (iteration, objective, change) for each matrix.

    Memory in units of one upcast tensor, n models: n differences, n delta_i, 5 (n + 1) for iterates
    to accelerate from, about 8 for scratch, one (short side)^2 matrix per model. In the smaller
    span if ``(n - 1) * short side`` is below the long side.

    Raises:
        ValueError: differing shapes, non-finite entries, or weights of a mean that sum to 0.
    """
    require_alike("tensors", tensors, base)
    shape, dtype = tensors[0].shape, compute_dtype(tensors if base is None else [*tensors, base])
    coefficients = [1.0] * len(tensors) if weights is None else list(weights)
    if (combine == "mean" or len(shape) < 2) and math.fsum(coefficients) == 0.0:
        raise ValueError("weights: found a sum of 0; expected another sum, by which to divide")
    if len(shape) < 2 or not tensors[0].numel():
        return _averaged([t.to(dtype) for t in tensors], coefficients)

    def limits(space: Span) -> Limits:
        if tolerance is not None:
            return Limits(max_iterations, tolerance, on_iteration=on_iteration)
        rounding = ROUNDING * torch.finfo(output or dtype).eps * space.length / space.scale
        # Calibrated, the sum is as long as the mean with another factor.
        how = (1.0, "mean" if combine == "sum" else combine) if calibrated else (lam, combine)
        length = max(map(norm, space.differences)) if calibrated else 0.0
        error = ROUNDING_SHARE * rounding / _growth(coefficients, *how)
        reach = 1.0 if output and torch.finfo(output).eps > torch.finfo(dtype).eps else REACH
        return Limits(max_iterations, LEAST_TOLERANCE, error, length, reach, on_iteration)

    def rule(slot: int, norms: Sequence[float], scale: float, short_side: int) -> Rule:
        """For matrices divided by `scale` with these largest singular values."""
        if rank_ratio is not None:
            # 0.2 * 15 is 3.0000000000000004 and means 3
            return Rule(rank=math.ceil(round(rank_ratio * short_side, 9)))
        if mu_relative is not None:
            return Rule(mu=mu_relative * max(norms))
        assert mu is not None
        return Rule(mu=(mu[slot] if isinstance(mu, Sequence) else mu) / scale)

    def solution(space: Span, slot: int) -> tuple[Outcome, Sequence[float], Rule]:
        differences = space.differences
        shrinkers = [shrinker_for(d.device.type, d.shape) for d in differences]
        norms = [shrinker.start(d) for shrinker, d in zip(shrinkers, differences, strict=True)]
        shrink = rule(slot, norms, space.scale, len(differences[0]))
        pairs = zip(shrinkers, differences, strict=True)
        parts = [shrinker.first(d, shrink) for shrinker, d in pairs]
        problem = Problem(differences, shrinkers, shrink)
        solve = UPDATES[update] if base is None else over_base
        return solve(problem, parts, limits(space)), norms, shrink

    def solved(slot: int, models: Sequence[Tensor], start: Tensor | None) -> LoreResult:
        space = Span(models, start, dtype)
        outcome, norms, shrink = solution(space, slot)
        deltas = [part.value for part in outcome.parts]
        merged, theta_0 = space.merged(deltas, coefficients, lam, combine)
        return LoreResult(
            merged=merged,
            base=theta_0,
            iterations=outcome.iterations,
            change=outcome.change,
            objective=outcome.objective * space.scale**2,
            converged=outcome.converged,
            ranks=tuple(part.rank for part in outcome.parts),
            spectral_norms=tuple(value * space.scale for value in norms),
            thresholds=() if shrink.mu is None else (shrink.mu * space.scale,),
        )

    starts = None if base is None else matrices_of(base, layout)
    results = []
    for slot, models in enumerate(zip(*(matrices_of(t, layout) for t in tensors), strict=True)):
        results.append(solved(slot, models, None if starts is None else starts[slot]))
    return _gathered(results, shape)


def _growth(weights: Sequence[float], lam: float, combine: str) -> float:
    """Return at most by how much an error of theta_0 grows in theta*, and at least 1.

    An error e of ``mean - theta_0``, the mean of the delta_i, moves each of them by at most
    ``||e||``.
    """
    count, total = len(weights), math.fsum(weights)
    if combine == "ties":
        return 1.0 + abs(lam) * math.sqrt(count)
    if combine == "mean":
        if total == 0.0:
            return math.inf
        lam = lam / total
    uneven = math.fsum(abs(weight - total / count) for weight in weights)
    return max(1.0, abs(lam * total - 1.0) + abs(lam) * uneven)


def _averaged(models: list[Tensor], weights: list[float]) -> LoreResult:
    """Return the weighted mean, exact for identical models: vectors, scalars, and what is empty."""
    shift = weighted_sum([m - models[0] for m in models], weights) / math.fsum(weights)
    mean = models[0] + shift
    apart = [norm((m - mean).double()) for m in models]
    objective = 0.5 * math.fsum(d * d for d in apart)
    ranks = (0,) * len(models)
    return LoreResult(mean, mean.clone(), 0, 0.0, objective, True, ranks, tuple(apart), ())


def _gathered(results: Sequence[LoreResult], shape: torch.Size) -> LoreResult:
    if len(results) == 1:  # without a copy
        merged, theta_0 = (matrix.reshape(shape) for matrix in (results[0].merged, results[0].base))
        return replace(results[0], merged=merged, base=theta_0)
    return LoreResult(
        merged=torch.stack([r.merged for r in results]).reshape(shape),
        base=torch.stack([r.base for r in results]).reshape(shape),
        iterations=max(r.iterations for r in results),
        change=max(r.change for r in results),
        objective=math.fsum(r.objective for r in results),
        converged=all(r.converged for r in results),
        ranks=tuple(map(max, zip(*(r.ranks for r in results), strict=True))),
        spectral_norms=tuple(map(max, zip(*(r.spectral_norms for r in results), strict=True))),
        thresholds=tuple(mu for r in results for mu in r.thresholds),
    )
