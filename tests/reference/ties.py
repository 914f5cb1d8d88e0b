"""TIES as mergekit defines it, slow and obvious, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def trim(delta: Tensor, density: float, rescale: bool = False) -> Tensor:
    """Keep the largest magnitudes; of equal ones at the edge, the first."""
    if density >= 1:
        return delta
    flat = delta.flatten()
    keep = max(1, int(density * flat.numel())) if density > 0 and flat.numel() else 0
    order = sorted(range(flat.numel()), key=lambda i: (-abs(float(flat[i])), i))
    mask = torch.zeros_like(flat)
    mask[order[:keep]] = 1
    kept = flat * mask
    if rescale and min(float(flat.abs().sum()), float(kept.abs().sum())) >= 1e-7:
        kept = kept * flat.abs().sum() / kept.abs().sum()
    return kept.reshape(delta.shape)


def merge(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    elect: bool = True,
    normalize: bool = True,
    rescale: bool = False,
    factor: float = 1.0,
) -> Tensor:
    """One tensor."""
    base = base.double()
    deltas = [
        w * trim(t.double() - base, d, rescale)
        for t, w, d in zip(tensors, weights, densities, strict=True)
    ]
    if not elect:
        divisor = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1.0
        return base + factor * sum(deltas) / divisor
    elected = torch.where(sum(deltas) >= 0, 1.0, -1.0).double()
    top, bottom = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() == elected).double()
        top += delta * agrees
        bottom += weight * agrees
    if normalize:
        top = top / torch.where(bottom == 0, 1.0, bottom)
    return base + factor * top
