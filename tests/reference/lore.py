"""LoRE-Merging, Algorithm 1, slow and obvious: float64, a full SVD per model per iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def svt(x: Tensor, mu: float) -> Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag((s - mu).clamp(min=0.0)) @ v


def truncate(x: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


@dataclass
class Reference:
    merged: Tensor
    base: Tensor
    deltas: list[Tensor]
    objective: float
    iterations: int


def combined(deltas: Sequence[Tensor], weights: Sequence[float], combine: str) -> Tensor:
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    if combine == "sum":
        return sum(weighted)
    if combine == "mean":
        return sum(weighted) / sum(weights)
    tau = torch.zeros_like(deltas[0])
    flat = [d.flatten().tolist() for d in deltas]
    for place in range(tau.numel()):
        column = [f[place] for f in flat]
        total = sum(w * c for w, c in zip(weights, column, strict=True))
        sign = (total > 0) - (total < 0)
        agree = [
            (w, c)
            for w, c in zip(weights, column, strict=True)
            if sign != 0 and (c > 0) - (c < 0) == sign
        ]
        if agree and sum(w for w, _ in agree) != 0:
            tau.view(-1)[place] = sum(w * c for w, c in agree) / sum(w for w, _ in agree)
    return tau


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
    iterations: int = 2000,
    tolerance: float = 1e-9,
) -> Reference:
    """Matrices only. Runs until theta_0 moves by `tolerance` of its distance from the mean."""
    models = [t.double() for t in tensors]
    n = len(models)
    weights = [1.0] * n if weights is None else list(weights)
    start = sum(models) / n if base is None else base.double()
    if mu_relative is not None:
        mu = mu_relative * max(float(torch.linalg.matrix_norm(m - start, 2)) for m in models)
    rank = 0
    if rank_ratio is not None:
        rank = math.ceil(round(rank_ratio * min(models[0].shape), 9))

    def shrink(x: Tensor) -> Tensor:
        return truncate(x, rank) if mu is None else svt(x, mu)

    theta_0 = start
    deltas = [torch.zeros_like(m) for m in models]
    count = 0
    while count < iterations:
        count += 1
        if base is not None:
            deltas = [shrink(m - theta_0) for m in models]
            break
        before = theta_0
        for i in range(n):
            deltas[i] = shrink(models[i] - theta_0)
            if update == "sequential":
                theta_0 = sum(m - d for m, d in zip(models, deltas, strict=True)) / n
        theta_0 = sum(m - d for m, d in zip(models, deltas, strict=True)) / n
        if torch.linalg.norm(theta_0 - before) <= tolerance * torch.linalg.norm(theta_0 - start):
            break

    pairs = zip(models, deltas, strict=True)
    value = sum(0.5 * torch.linalg.norm(theta_0 + d - m) ** 2 for m, d in pairs)
    if mu is not None:
        value += sum(mu * torch.linalg.svdvals(d).sum() for d in deltas)
    merged = theta_0 + lam * combined(deltas, weights, combine)
    return Reference(merged, theta_0, deltas, float(value), count)
