"""Iso-C and Iso-CTS of one matrix with full singular value decompositions in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.tsv import RESOLUTION, nearest


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """Matrices are made isotropic, anything with fewer axes is averaged."""
    if deltas[0].ndim < 2:
        return sum(d.double() for d in deltas) / len(deltas)
    if len(deltas) == 1:
        return deltas[0].double()
    u, sigma, vh = _full(sum(d.double() for d in deltas), _least(deltas))
    if not len(sigma):
        return torch.zeros(deltas[0].shape, dtype=torch.float64)
    return u @ torch.diag(sigma.mean().expand(len(sigma))) @ vh


def iso_cts(deltas: Sequence[Tensor], fraction: float = 0.8) -> Tensor:
    """Directions of the sum, and of what each task has beside the first of them."""
    if deltas[0].ndim < 2 or len(deltas) == 1:
        return iso_c(deltas)
    share, least = _share(deltas), _least(deltas)
    u, sigma, vh = _full(sum(d.double() for d in deltas), least)
    rank, tasks = len(sigma), len(deltas)
    if not rank:
        return torch.zeros(deltas[0].shape, dtype=torch.float64)
    own = min(rank // tasks, round((rank - int(fraction * rank)) / tasks))
    first = rank - tasks * own
    left, right, values = list(u.T[:first]), list(vh[:first]), list(sigma[:first])
    common = torch.eye(len(u), dtype=torch.float64)
    for column in left:
        common = common - torch.outer(column, column)
    for delta in deltas:
        p, s, qh = torch.linalg.svd(common @ delta.double(), full_matrices=False)
        for j in range(own):
            if s[j] > least:
                left.append(p[:, j])
                right.append(qh[j])
                values.append(s[j])
    mean = torch.stack(values).mean()
    return mean * nearest(torch.stack(left, 1), share) @ nearest(torch.stack(right, 1), share).T


def _share(deltas: Sequence[Tensor]) -> float:
    return RESOLUTION[torch.promote_types(deltas[0].dtype, torch.float32)]


def _least(deltas: Sequence[Tensor]) -> float:
    return _share(deltas) * max(float(d.double().norm()) for d in deltas)


def _full(matrix: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = sum(float(s) > least for s in sigma)
    return u[:, :rank], sigma[:rank], vh[:rank]
