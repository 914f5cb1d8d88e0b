r"""Isotropic merging: the directions of the summed task vectors, all with one singular value.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
Subspaces" (https://arxiv.org/abs/2502.04959).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import power_of_two
from mergekit_ext.kernels.threads import in_threads
from mergekit_ext.kernels.tsv import RESOLUTION, Triplets, by_matrix, leading, nearest, polar


def isotropic(deltas: Sequence[Tensor], layout: str = "matrix") -> Tensor:
    r"""Return the sum of the task vectors with equal singular values (Iso-C).

    Of :math:`\sum_i t_i = U\,\mathrm{diag}(\sigma)\,V^T` it is :math:`\bar\sigma\, U V^T`, where
    :math:`\bar\sigma` is the mean of the singular values. *Departure from the authors' code*, which
    lets numerically zero directions take part, whose singular vectors are arbitrary: here singular
    values below `tsv.RESOLUTION` of the largest are left out, of the mean too. So the coordinates
    of LoRAs in their common space give what their changes give.

    Args:
        deltas: one task vector per model, of one shape; finite. Half precision is upcast.
        layout: see `linear_algebra.matrices_of`; each matrix is merged by itself.

    Returns:
        the shape of the inputs, float32 (float64 if one of them is). Tensors of one or no axis are
        averaged, not summed, as in the code.

    Raises:
        ValueError: shapes that differ, or non-finite entries.
    """
    return by_matrix(deltas, layout, _isotropic)


def common_and_specific(
    deltas: Sequence[Tensor], fraction: float = 0.8, layout: str = "matrix"
) -> Tensor:
    r"""Return the isotropic merge in common and task-specific subspaces (Iso-CTS).

    With r the rank of :math:`\sum_i t_i` and m tasks,

    .. math:: s = \mathrm{round}((r - \lfloor f r \rfloor)/m), \qquad k = r - m s.

    The k leading triplets of the sum are the common ones, with the left vectors U_k; to them come
    the s leading triplets of each :math:`t_i - U_k U_k^T t_i`. Of all r of them, U and V side by
    side are replaced by the nearest matrices with orthonormal columns, as in `tsv.tsv_merge`, and
    the result is :math:`\bar\sigma\, \hat U \hat V^T`, with the mean of their singular values.

    Args:
        fraction: f, in [0, 1], the share of the common triplets; 1 is `isotropic`.

    Departure, other arguments, result and errors are those of `isotropic`.
    """
    return by_matrix(deltas, layout, lambda matrices, dtype: _subspaces(matrices, dtype, fraction))


def _isotropic(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    total, scale = _sum(matrices)
    wide = total.shape[0] < total.shape[1]
    tall = total.T if wide else total
    ((factor, sigma),) = in_threads(lambda each: polar(each, dtype), [tall], total.device)
    mean = float(sigma.mean()) * scale if len(sigma) else 0.0
    return (factor.T if wide else factor).mul(mean).to(dtype)


def _subspaces(matrices: Sequence[Tensor], dtype: torch.dtype, fraction: float) -> Tensor:
    total, scale = _sum(matrices)
    most = min(total.shape)
    (found,) = in_threads(lambda each: leading(each, most, dtype), [total], total.device)
    rank, tasks = len(found.sigma), len(matrices)
    if not rank:
        return torch.zeros_like(total, dtype=dtype)
    each = min(rank // tasks, round((rank - int(fraction * rank)) / tasks))
    common = Triplets(*(part[..., : rank - tasks * each] for part in found))
    least = RESOLUTION[dtype] * float(found.sigma[0])

    def specific(matrix: Tensor) -> Triplets:
        inside = matrix.to(torch.float64) / scale
        rest = inside - common.u @ (common.u.T @ inside)
        own = leading(rest, each, dtype)
        # What the common space leaves of a task may be rounding alone.
        return Triplets(*(part[..., : int((own.sigma > least).sum())] for part in own))

    parts = [common, *(in_threads(specific, matrices, total.device) if each else ())]
    u, v = nearest(parts, dtype)
    mean = float(torch.cat([part.sigma for part in parts]).mean()) * scale
    (merged,) = in_threads(lambda left: left @ v.T, [u * mean], total.device)
    return merged.to(dtype)


def _sum(matrices: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the sum in float64, over a power of two near the largest entry of all, and that."""
    scale = max(map(power_of_two, matrices))
    total = torch.zeros_like(matrices[0], dtype=torch.float64)
    for matrix in matrices:
        total.add_(matrix.to(torch.float64), alpha=1.0 / scale)
    return total, scale
