"""The optimisation behind LoRE-Merging, for one matrix of each model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.svt import Eigen, Shrunk

Iteration = Callable[[int, float, float], None]


@dataclass(frozen=True)
class Limits:
    max_iterations: int
    tolerance: float

    @classmethod
    def checked(cls, max_iterations: int, tolerance: float) -> Limits:
        if max_iterations < 1:
            raise ValueError(f"max_iterations: found {max_iterations!r}; expected at least 1")
        if not (math.isfinite(tolerance) and tolerance >= 0.0):
            raise ValueError(f"tolerance: found {tolerance!r}; expected a finite number >= 0")
        return cls(max_iterations, tolerance)


@dataclass(frozen=True)
class Shrinkage:
    mu: float | None
    mu_relative: float | None
    rank_ratio: float | None

    @classmethod
    def chosen(
        cls, mu: float | None, mu_relative: float | None, rank_ratio: float | None
    ) -> Shrinkage:
        given = {"mu": mu, "mu_relative": mu_relative, "rank_ratio": rank_ratio}
        named = {k: v for k, v in given.items() if v is not None}
        if len(named) != 1:
            raise ValueError(
                f"mu, mu_relative, rank_ratio: found {named or 'none of them'}; expected exactly one"
            )
        for name, value in named.items():
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name}: found {value!r}; expected a finite number >= 0")
        if rank_ratio is not None and rank_ratio > 1.0:
            raise ValueError(f"rank_ratio: found {rank_ratio!r}; expected a number from 0 to 1")
        return cls(mu, mu_relative, rank_ratio)


@dataclass(frozen=True)
class Fit:
    base: Tensor
    deltas: list[Tensor]
    iterations: int
    change: float
    objective: float
    converged: bool
    ranks: tuple[int, ...]
    spectral_norms: tuple[float, ...]
    mu: float | None


def fit(
    models: list[Tensor],
    base: Tensor | None,
    shrinkage: Shrinkage,
    update: str,
    limits: Limits,
    on_iteration: Iteration | None,
) -> Fit:
    if models[0].numel() == 0:
        zeros = (0,) * len(models)
        empty = models[0].clone()
        return Fit(
            empty, [empty] * len(models), 0, 0.0, 0.0, True, zeros, (0.0,) * len(models), shrinkage.mu
        )
    if base is None:
        shift = torch.stack([m - models[0] for m in models]).mean(0)
        centre = models[0] + shift
        diffs = [m - models[0] - shift for m in models]
    else:
        centre = base
        diffs = [m - base for m in models]
    n = len(models)
    eig = [Eigen.of(d, torch.float64) for d in diffs]
    norms = tuple(float(e.sigma[-1]) for e in eig)
    mu = shrinkage.mu
    rank = None
    if shrinkage.mu_relative is not None:
        mu = shrinkage.mu_relative * max(norms)
    if shrinkage.rank_ratio is not None:
        rank = math.ceil(shrinkage.rank_ratio * min(models[0].shape))

    def shrink(x: Tensor) -> Shrunk:
        e = Eigen.of(x, torch.float64)
        return e.truncate(rank) if rank is not None else e.threshold(mu)

    def objective(s, parts):
        out = 0.0
        for d, p in zip(diffs, parts, strict=True):
            out += 0.5 * float(torch.linalg.vector_norm(d + s - p.value, dtype=torch.float64)) ** 2
            out += mu * p.nuclear if mu is not None else 0.0
        return out

    s = torch.zeros_like(diffs[0])
    if base is not None:
        parts = [shrink(d) for d in diffs]
        obj = objective(s, parts)
        if on_iteration:
            on_iteration(1, obj, 0.0)
        return Fit(base, [p.value for p in parts], 1, 0.0, obj, True,
                   tuple(p.rank for p in parts), norms, mu)
    parts = [None] * n
    change, it = math.inf, 0
    for it in range(1, limits.max_iterations + 1):
        old = s
        if update == "sequential":
            values = [torch.zeros_like(s) if p is None else p.value for p in parts]
            for i in range(n):
                parts[i] = shrink(diffs[i] + s)
                s = s + (parts[i].value - values[i]) / n
        else:
            parts = [shrink(d + s) for d in diffs]
            s = torch.stack([p.value for p in parts]).mean(0)
        size = float(torch.linalg.vector_norm(s))
        change = float(torch.linalg.vector_norm(s - old)) / size if size > 0 else 0.0
        obj = objective(s, parts)
        if on_iteration:
            on_iteration(it, obj, change)
        if change <= limits.tolerance:
            break
    return Fit(centre - s, [p.value for p in parts], it, change, obj, change <= limits.tolerance,
               tuple(p.rank for p in parts), norms, mu)


UPDATES = {"simultaneous": fit, "sequential": fit}
