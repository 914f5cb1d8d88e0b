"""EMR-Merging, slow and obvious, in float64, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unified(deltas: Sequence[Tensor]) -> Tensor:
    """One part."""
    flat = [d.double().flatten().tolist() for d in deltas]
    merged = []
    for values in zip(*flat, strict=True):
        total = sum(values)
        sign = (total > 0) - (total < 0)
        merged.append(sign * max([abs(v) for v in values if v * sign > 0], default=0.0))
    return torch.tensor(merged, dtype=torch.float64).reshape(deltas[0].shape)


def mask(delta: Tensor, common: Tensor) -> Tensor:
    """One part."""
    return delta.double() * common.double() > 0


def rescale(delta: Sequence[Tensor], common: Sequence[Tensor]) -> float:
    """The whole block."""
    whole = sum(float(d.double().abs().sum()) for d in delta)
    left = sum(
        float((c.double().abs() * mask(d, c)).sum()) for d, c in zip(delta, common, strict=True)
    )
    if whole == 0:
        return 0.0
    return whole / left if left else 1.0


def reconstruct(base: Tensor, common: Tensor, selected: Tensor, factor: float) -> Tensor:
    """One task's weights."""
    return base.double() + factor * common.double() * selected.double()
