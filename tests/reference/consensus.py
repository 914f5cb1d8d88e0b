"""TALL masks in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def mask(delta: Tensor, unified: Tensor, threshold: float) -> Tensor:
    """One part."""
    kept = [
        abs(Fraction(d)) >= Fraction(threshold) * abs(Fraction(u) - Fraction(d))
        for d, u in zip(delta.flatten().tolist(), unified.flatten().tolist(), strict=True)
    ]
    return torch.tensor(kept, dtype=torch.bool).reshape(delta.shape)
