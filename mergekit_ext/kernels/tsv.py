r"""TSV-Merge: the leading singular vectors of each task, decorrelated.

Gargiulo et al. 2025, "Task Singular Vectors: Reducing Task Interference in Model Merging".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import matrices_of, power_of_two
from mergekit_ext.kernels.numerics import compute_dtype, require_alike
from mergekit_ext.kernels.threads import by_one_thread, in_threads

# Directions whose singular value is below this share of the largest are rounding of the data.
RESOLUTION = {torch.float32: 1e-5, torch.float64: 1e-12}
# Gram matrices square the condition number. In float64, with singular values down to this share
# of the largest, singular vectors are good to about 1e-8, below the resolution of float32.
_GRAM_RANGE = 1e-4


class Triplets(NamedTuple):
    """``U diag(sigma) V^T``; float64, the columns of `u` and `v` are orthonormal."""

    u: Tensor
    sigma: Tensor
    v: Tensor


def tsv_merge(deltas: Sequence[Tensor], layout: str = "matrix", count: int | None = None) -> Tensor:
    r"""Return the merged task vector :math:`\hat U\,\mathrm{diag}(\sigma)\,\hat V^T`.

    Of each of the m task vectors, ``(a, b)`` matrices of full rank r = min(a, b), the
    :math:`k = \max(1, \lfloor r/m \rfloor)` leading singular triplets are taken. With
    :math:`U = [U_1 \dots U_m]`, V and sigma alike, :math:`\hat U` and :math:`\hat V` are the
    nearest matrices to U and V with orthonormal columns, their polar factors (orthogonal
    Procrustes): :math:`\hat U = P Q^T` for :math:`U = P D Q^T`.

    *Departure from the authors' code.* Directions that are numerically zero have arbitrary
    singular vectors, which the code lets take part. Here triplets with a singular value below
    `RESOLUTION` of the task vector's largest are left out, and so are singular vectors of U and V
    below `RESOLUTION` of theirs: the polar factor is then the partial isometry, which is unique.
    Hence m identical task vectors give their best approximation of rank k. The paper's algorithm
    does not say what k is for m > r, where the code's is 0; here 1.

    Args:
        deltas: one task vector per model, of one shape; finite. Half precision is upcast.
        layout: see `matrices_of`; each matrix is merged by itself.
        count: k where the matrices are coordinates in a smaller space; by default the k above.

    Returns:
        the shape of the inputs, float32 (float64 if one of them is). Tensors of one or no axis
        are averaged, as in the code. Decompositions are float64: of Gram matrices where that
        loses nothing for float32 data, full singular value decompositions otherwise.

    Raises:
        ValueError: shapes that differ, or non-finite entries.
    """
    return by_matrix(deltas, layout, lambda matrices, dtype: _merge(matrices, dtype, count))


def by_matrix(
    deltas: Sequence[Tensor], layout: str, merge: Callable[[Sequence[Tensor], torch.dtype], Tensor]
) -> Tensor:
    """Merge each matrix of the task vectors by itself; average tensors of one or no axis.

    Raises:
        ValueError: shapes that differ, or non-finite entries.
    """
    require_alike("deltas", deltas)
    dtype = compute_dtype(deltas)
    shape = deltas[0].shape
    if len(shape) < 2 or deltas[0].numel() == 0:
        mean = torch.zeros(shape, dtype=torch.float64, device=deltas[0].device)
        for delta in deltas:
            mean.add_(delta)
        return mean.div_(len(deltas)).to(dtype)
    stacks = [matrices_of(delta, layout) for delta in deltas]
    out = torch.empty(stacks[0].shape, dtype=dtype, device=deltas[0].device)
    for slot in range(len(out)):
        out[slot] = merge([stack[slot] for stack in stacks], dtype)
    return out.reshape(shape)


def _merge(matrices: Sequence[Tensor], dtype: torch.dtype, count: int | None) -> Tensor:
    count = count or max(1, min(matrices[0].shape) // len(matrices))
    # By threads of our own: torch's would round differently with another number of them.
    device, most = matrices[0].device, count
    found = in_threads(lambda matrix: leading(matrix, most, dtype), matrices, device)
    sigma = torch.cat([task.sigma for task in found])
    if not len(sigma):
        return torch.zeros_like(matrices[0], dtype=dtype)
    u, v = nearest(found, dtype)
    return by_one_thread(torch.matmul)(u * sigma, v.T).to(dtype)


def nearest(triplets: Sequence[Triplets], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\hat U` and :math:`\hat V` of all triplets side by side."""
    sides = [torch.cat(side, 1) for side in zip(*((t.u, t.v) for t in triplets), strict=True)]
    u, v = in_threads(lambda columns: polar(columns, dtype)[0], sides, sides[0].device)
    return u, v


def leading(matrix: Tensor, count: int, dtype: torch.dtype) -> Triplets:
    """Return at most `count` singular triplets, largest first; fewer if the rank is lower."""
    scale = power_of_two(matrix)
    scaled = matrix.to(torch.float64) / scale
    triplets = _by_gram(scaled, count) if dtype == torch.float32 else None
    if triplets is None:
        u, sigma, vh = torch.linalg.svd(scaled, full_matrices=False)
        triplets = Triplets(u[:, :count], sigma[:count], vh[:count].T)
    sigma = triplets.sigma
    rank = int(((sigma > RESOLUTION[dtype] * sigma[0]) & (sigma > 0)).sum())
    return Triplets(triplets.u[:, :rank], sigma[:rank] * scale, triplets.v[:, :rank])


def _by_gram(matrix: Tensor, count: int) -> Triplets | None:
    """Return the leading triplets from the smaller Gram matrix; None if that is not safe."""
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    values, vectors = torch.linalg.eigh(short @ short.T)
    sigma = values[-count:].flip(0).clamp_(min=0.0).sqrt_()
    if float(sigma[-1]) <= _GRAM_RANGE * float(sigma[0]):
        return None
    left = vectors[:, -count:].flip(1)
    right = (short.T @ left) / sigma
    return Triplets(left, sigma, right) if wide else Triplets(right, sigma, left)


def polar(columns: Tensor, dtype: torch.dtype, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the polar factor and the singular values, without those that are numerically zero.

    Those up to `least` are, too.
    """
    if dtype == torch.float32 and columns.shape[1] <= columns.shape[0]:
        values, vectors = torch.linalg.eigh(columns.T @ columns)
        if float(values[0]) > max(_GRAM_RANGE**2 * float(values[-1]), least**2):
            sigma = values.sqrt()
            return columns @ ((vectors / sigma) @ vectors.T), sigma
    p, d, qh = torch.linalg.svd(columns, full_matrices=False)
    rank = int((d > max(RESOLUTION[dtype] * float(d[0]), least)).sum())
    return p[:, :rank] @ qh[:rank], d[:rank]
