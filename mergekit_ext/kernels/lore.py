"""LoRE-Merging of one parameter: an estimated base and low-rank task vectors.

The solver of the matrix problem is in `lore_outer`; here are the public function, what it accepts,
how tensors that are not matrices are seen, and how the task vectors are combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.lore_outer import UPDATES, Fit, Iteration, Limits, Shrinkage, fit
from mergekit_ext.kernels.svt import compute_dtype

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
    """TODO"""
    shrinkage = Shrinkage.chosen(mu, mu_relative, rank_ratio)
    limits = Limits.checked(max_iterations, tolerance)
    tau_of = _named("combine", combine, COMBINE)
    view = _named("layout", layout, LAYOUTS)
    _named("update", update, UPDATES)
    _check_tensors(tensors, base)
    coefficients = _checked_weights(weights, len(tensors), combine)
    if not math.isfinite(lam):
        raise ValueError(f"lam: found {lam!r}; expected a finite number")

    dtype = compute_dtype(*tensors) if base is None else compute_dtype(*tensors, base)
    shape = tensors[0].shape
    if len(shape) < 2:
        return _average([t.to(dtype) for t in tensors], coefficients, mu)
    models = [view(t.to(dtype)) for t in tensors]
    start = None if base is None else view(base.to(dtype))
    results = []
    for slot in range(models[0].shape[0]):
        chosen = [m[slot] for m in models]
        fitted = fit(
            chosen,
            None if start is None else start[slot],
            shrinkage,
            update,
            limits,
            on_iteration,
        )
        merged = _merge(fitted, tau_of, coefficients, lam)
        results.append((merged, fitted))
    return _gather(results, shape, len(tensors), dtype, tensors[0].device, mu)


def _merge(fitted: Fit, tau_of: Combine, weights: list[float], lam: float) -> Tensor:
    return fitted.base + lam * tau_of(fitted.deltas, weights)


# --- combining task vectors -----------------------------------------------------------------

Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def _sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Algorithm 1, optional 1: ``tau = sum_i w_i delta_i`` (the paper has w_i = 1)."""
    tau = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        tau.add_(delta, alpha=weight)
    return tau


def _mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``tau = sum_i w_i delta_i / sum_i w_i``."""
    return _sum(deltas, weights) / math.fsum(weights)


def _ties(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Algorithm 1, optional 2: the mean of the entries that agree with the elected sign."""
    elected = _sum(deltas, weights).sign_()
    total, mass = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() == elected).to(delta.dtype)
        total.add_(delta * agrees, alpha=weight)
        mass.add_(agrees, alpha=weight)
    empty = mass == 0
    return torch.where(empty, 0.0, total / torch.where(empty, 1.0, mass))


COMBINE: dict[str, Combine] = {"sum": _sum, "mean": _mean, "ties": _ties}


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
    shift = _sum([m - models[0] for m in models], weights) / total
    mean = models[0] + shift
    apart = [float(torch.linalg.vector_norm(m - mean, dtype=torch.float64)) for m in models]
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


def _gather(
    results: list[tuple[Tensor, Fit]],
    shape: torch.Size,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    mu: float | None,
) -> LoreResult:
    """One result from those of the matrices of a stack (mostly a stack of one)."""
    if not results:
        empty = torch.empty(shape, dtype=dtype, device=device)
        zeros = (0.0,) * count
        return LoreResult(empty, empty.clone(), 0, 0.0, 0.0, True, (0,) * count, zeros, mu)
    fits = [f for _, f in results]
    used = [f.mu for f in fits if f.mu is not None]
    return LoreResult(
        merged=torch.stack([m for m, _ in results]).reshape(shape),
        base=torch.stack([f.base for f in fits]).reshape(shape),
        iterations=max(f.iterations for f in fits),
        change=max(f.change for f in fits),
        objective=math.fsum(f.objective for f in fits),
        converged=all(f.converged for f in fits),
        ranks=tuple(max(r) for r in zip(*(f.ranks for f in fits), strict=True)),
        spectral_norms=tuple(max(s) for s in zip(*(f.spectral_norms for f in fits), strict=True)),
        mu=max(used) if used else None,
    )


def _named(parameter: str, value: str, registry: dict[str, Callable[..., object]]) -> Callable:
    if value not in registry:
        raise ValueError(f"{parameter}: found {value!r}; expected one of {', '.join(registry)}")
    return registry[value]


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
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ValueError(
                    f"{name}: found {bad} non-finite values among {tensor.numel()}; expected "
                    "finite weights"
                )
