"""TSV-Merge of one matrix with full singular value decompositions in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESOLUTION = {torch.float32: 1e-5, torch.float64: 1e-12}


def merge(deltas: Sequence[Tensor]) -> Tensor:
    """Matrices are merged, anything with fewer axes is averaged."""
    if deltas[0].ndim < 2:
        return sum(d.double() for d in deltas) / len(deltas)
    share = RESOLUTION[torch.promote_types(deltas[0].dtype, torch.float32)]
    keep = max(1, min(deltas[0].shape) // len(deltas))
    left, values, right = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        for j in range(keep):
            if s[j] > share * s[0]:
                left.append(u[:, j])
                values.append(s[j])
                right.append(vh[j])
    if not values:
        return torch.zeros(deltas[0].shape, dtype=torch.float64)
    u, v = nearest(torch.stack(left, 1), share), nearest(torch.stack(right, 1), share)
    return u @ torch.diag(torch.stack(values)) @ v.T


def nearest(columns: Tensor, share: float) -> Tensor:
    p, d, qh = torch.linalg.svd(columns, full_matrices=False)
    return sum(torch.outer(p[:, j], qh[j]) for j in range(len(d)) if d[j] > share * d[0])
