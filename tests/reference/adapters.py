"""Merging LoRAs, slow and obvious: dense changes in float64, the rule, the best rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_merge.adapter import Update
from tests.reference import pcb, ties, tsv


def dense(updates: Sequence[Update | None], shape: tuple[int, int, int]) -> list[Tensor]:
    """Each change; zeros where an adapter has none, as with rank 0."""
    found = []
    for update in updates:
        total = torch.zeros(shape, dtype=torch.float64)
        if update is not None:
            for index in range(shape[0]):
                for j in range(update.a.shape[1]):
                    column, row = update.b[index, :, j].double(), update.a[index, j].double()
                    total[index] += update.scale * torch.outer(column, row)
        found.append(total)
    return found


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank (Eckart and Young)."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    total = sum(w * t for w, t in zip(weights, tensors, strict=True))
    return total / sum(weights) if normalize else total


def svt(matrix: Tensor, mu: float) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s - mu).clamp(min=0)) @ vh


def lore_known(tensors: Sequence[Tensor], weights: Sequence[float], mu: float) -> Tensor:
    """LoRE around a base that is known: each change is thresholded once."""
    return sum(w * svt(t, mu) for w, t in zip(weights, tensors, strict=True))


def lore_estimated(tensors: Sequence[Tensor], mu: float, iterations: int = 3000) -> Tensor:
    """Algorithm 1 as it is written."""
    deltas = [torch.zeros_like(t) for t in tensors]
    for _ in range(iterations):
        base = sum(t - d for t, d in zip(tensors, deltas, strict=True)) / len(tensors)
        deltas = [svt(t - base, mu) for t in tensors]
    base = sum(t - d for t, d in zip(tensors, deltas, strict=True)) / len(tensors)
    return base + sum(deltas)


def tsv_m(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return tsv.merge(weighted(tensors, weights))


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [w * t for w, t in zip(weights, tensors, strict=True)]


def ties_family(
    tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], **options: bool
) -> Tensor:
    return ties.merge(torch.zeros_like(tensors[0]), tensors, weights, densities, **options)


def breadcrumbs(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """All but the largest, then the largest of these; of equal ones the first count as larger."""
    flat = tensor.flatten()
    order = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))
    wanted = int(density * len(flat))
    dropped = min(int(gamma * len(flat)), len(flat) - wanted)
    mask = torch.zeros_like(flat)
    mask[order[dropped : dropped + wanted]] = 1
    return (flat * mask).reshape(tensor.shape)


def pcb_merge(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    weighted = [w * t for w, t in zip(weights, tensors, strict=True)]
    return pcb.merge(weighted, density, 1e-4).reshape(tensors[0].shape)


def emr(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    rows = torch.stack([w * t for w, t in zip(weights, tensors, strict=True)])
    sign = rows.sum(0).sign()
    agrees = rows * (rows.sign() == sign)
    return sign * agrees.abs().max(0).values


def nan(tensors: Sequence[Tensor]) -> list[float]:
    inverse = [1 / float(t.norm()) if t.any() else 0.0 for t in tensors]
    return [value / sum(inverse) for value in inverse]
