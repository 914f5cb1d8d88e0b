"""PCB-Merging, slow and obvious: whole rows, full sorts, float64."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import torch
from torch import Tensor

SLACK = 1e-9  # 1e-4 * 30,000 is a little more than 3


def merge(deltas: Sequence[Tensor], density: float, clip: float) -> Tensor:
    """One vector (a block laid end to end)."""
    rows = torch.stack([d.double().flatten() for d in deltas])
    models, size = rows.shape
    total = rows.sum(0)
    top, bottom = torch.zeros(size).double(), torch.zeros(size).double()
    for row in rows:
        if not row.any():
            continue
        magnitudes = row.abs().sort().values
        bottom_cut, top_cut = floor(clip * size + SLACK), ceil(clip * size - SLACK)
        low = magnitudes[bottom_cut]
        high = magnitudes[max(size - 1 - top_cut, bottom_cut)]
        clipped = row.abs().clamp(low, high)
        own = torch.exp(models * _normed(clipped, torch.zeros_like(clipped)) ** 2)
        score = own * torch.tanh(row * total)
        threshold = score.sort().values[min(int(size * (1 - density)), size - 1)]
        share = _normed(score.clamp(min=threshold), (score >= score.max()).double())
        top += share * clipped * row.sign()
        bottom += share
    return torch.where(bottom == 0, 0.0, top / torch.where(bottom == 0, 1.0, bottom))


def _normed(x: Tensor, constant: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else constant
