"""Which rank a merged module gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

# Of the arithmetic in which singular values of cores are found.
EPS = torch.finfo(torch.float64).eps

# So many leading directions, all that are not rounding, or as many as hold this share of the sum
# of squares: {"energy": 0.99}.
Rank = int | Literal["lossless"] | Mapping[str, float]


def chosen(sigma: Tensor, rank: Rank, floor: float) -> int:
    r"""One rank for all matrices of a module; at least 1, which PEFT needs.

    Args:
        sigma: (n, k) singular values of each matrix, in descending order.
        rank: what is asked for. "lossless": the largest numerical rank. ``{"energy": e}``: the
            smallest r with :math:`\sum_{j \le r} \sigma_j^2 \ge e \sum_j \sigma_j^2`, summed over
            the matrices.
        floor: share of a matrix's largest singular value up to which one is rounding.

    Returns:
        from 1 to k; a number that is asked for as it is, up to k.
    """
    numerical = int((sigma > floor * sigma[:, :1]).sum(dim=1).max())
    if rank == "lossless":
        return max(1, numerical)
    if isinstance(rank, Mapping):
        kept = sigma.square().sum(dim=0).cumsum(dim=0)
        enough = int((kept < rank["energy"] * kept[-1]).sum()) + 1
        return max(1, min(enough, numerical))
    return max(1, min(int(rank), sigma.shape[1]))


def padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """`factor` with zeros behind it along `dim` up to `rank`."""
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)
