"""NAN, slow and obvious, in float64: section 3.3 of the paper, for whole state dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.reference.ties import merge as merge_ties

State = Mapping[str, Tensor]
Combine = Callable[[Tensor | None, list[Tensor], list[float]], Tensor]


def coefficients(norms: Sequence[float]) -> list[float]:
    """Equation 10; zero norms get coefficient 0."""
    inverse = [1 / norm if norm else 0.0 for norm in norms]
    return [value / sum(inverse) if sum(inverse) else 0.0 for value in inverse]


def frobenius(tensors: Sequence[Tensor]) -> float:
    """The norm of all entries of several tensors."""
    return float(torch.cat([t.double().flatten() for t in tensors]).norm())


def task_arithmetic(base: Tensor | None, tensors: list[Tensor], weights: list[float]) -> Tensor:
    """W_0 + sum w_i t_i; a weighted average without a base."""
    if base is None:
        return sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)
    return base + sum(w * (t - base) for w, t in zip(weights, tensors, strict=True))


def ties(density: float) -> Combine:
    """TIES with one density for all."""

    def combine(base: Tensor | None, tensors: list[Tensor], weights: list[float]) -> Tensor:
        return merge_ties(base, tensors, weights, [density] * len(tensors))

    return combine


def merge(
    models: Sequence[State],
    base: State | None,
    *,
    group_of: Callable[[str], str] = lambda name: name,
    combine: Combine = task_arithmetic,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    norm_of: str | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts; `group_of` maps a tensor's name to the group that shares coefficients."""
    weights = list(weights) if weights else [1.0] * len(models)
    over_base = base is not None and norm_of != "weights"
    if scale is None:
        scale = max(1.0, len(models) / 2) if base is not None else 1.0
    groups: dict[str, list[str]] = {}
    for name in models[0]:
        groups.setdefault(group_of(name), []).append(name)
    merged = {}
    for names in groups.values():
        norms = [
            frobenius([m[n].double() - base[n].double() if over_base else m[n] for n in names])
            for m in models
        ]
        products = [a * w for a, w in zip(coefficients(norms), weights, strict=True)]
        for name in names:
            w0 = None if base is None else base[name].double()
            if not any(norms):
                merged[name] = w0
                continue
            result = combine(w0, [m[name].double() for m in models], products)
            merged[name] = w0 + scale * (result - w0) if w0 is not None else scale * result
    return merged
