r"""Isotropic merging: the directions of the summed task vectors, all with one singular value.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
Subspaces" (https://arxiv.org/abs/2502.04959).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import norm, power_of_two
from mergekit_ext.kernels.threads import by_one_thread, in_threads
from mergekit_ext.kernels.tsv import RESOLUTION, Triplets, by_matrix, leading, nearest, polar


def isotropic(deltas: Sequence[Tensor], layout: str = "matrix") -> Tensor:
    r"""Return the sum of the task vectors with equal singular values (Iso-C).

    Of :math:`\sum_i t_i = U\,\mathrm{diag}(\sigma)\,V^T` it is :math:`\bar\sigma\, U V^T`, where
    :math:`\bar\sigma` is the mean of the singular values. *Departures from the authors' code.* It
    lets numerically zero directions take part, whose singular vectors are arbitrary: here singular
    values below `tsv.RESOLUTION` of the largest norm of a task vector are left out, of the mean
    too. So the coordinates of LoRAs in their common space give what their changes give. And one
    task vector alone comes back as it is.

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
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    summed = _Sum.of(matrices, dtype)
    wide = summed.total.shape[0] < summed.total.shape[1]
    tall = summed.total.T if wide else summed.total
    factor, sigma = by_one_thread(polar)(tall, dtype, summed.least)
    mean = float(sigma.mean()) * summed.scale if len(sigma) else 0.0
    return (factor.T if wide else factor).mul(mean).to(dtype)


def _subspaces(matrices: Sequence[Tensor], dtype: torch.dtype, fraction: float) -> Tensor:
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    summed = _Sum.of(matrices, dtype)
    total, scale, device = summed.total, summed.scale, summed.total.device

    def above(matrix: Tensor, most: int) -> Triplets:
        found = leading(matrix, most, dtype)
        return Triplets(*(part[..., : int((found.sigma > summed.least).sum())] for part in found))

    found = by_one_thread(above)(total, min(total.shape))
    rank, tasks = len(found.sigma), len(matrices)
    if not rank:
        return torch.zeros_like(total, dtype=dtype)
    each = min(rank // tasks, round((rank - int(fraction * rank)) / tasks))
    common = Triplets(*(part[..., : rank - tasks * each] for part in found))

    def specific(matrix: Tensor) -> Triplets:
        inside = matrix.to(torch.float64) / scale
        return above(inside - common.u @ (common.u.T @ inside), each)

    parts = [common, *(in_threads(specific, matrices, device) if each else ())]
    u, v = nearest(parts, dtype)
    mean = float(torch.cat([part.sigma for part in parts]).mean()) * scale
    return by_one_thread(torch.matmul)(u * mean, v.T).to(dtype)


class _Sum(NamedTuple):
    """The sum in float64 over `scale`, a power of two near the largest entry of all."""

    total: Tensor
    scale: float
    least: float  # singular values up to it are rounding of the inputs

    @classmethod
    def of(cls, matrices: Sequence[Tensor], dtype: torch.dtype) -> "_Sum":
        scale = max(map(power_of_two, matrices))
        total, largest = torch.zeros_like(matrices[0], dtype=torch.float64), 0.0
        for matrix in matrices:
            scaled = matrix.to(torch.float64) / scale
            total.add_(scaled)
            largest = max(largest, norm(scaled))
        return cls(total, scale, RESOLUTION[dtype] * largest)
