r"""The leading singular triplets of a dense matrix, without its full decomposition.

Block Lanczos on :math:`X X^T` from random vectors, every block orthogonalised against all others
(Golub, Luk and Overton 1981, "A Block Lanczos Method for Computing the Singular Values and
Corresponding Singular Vectors of a Matrix"). The approximation from the space found so far can
only get better as it grows; it grows until it hardly does.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import (
    cholesky,
    eigh,
    gram,
    matmul,
    norm,
    power_of_two,
    qr,
    solve_triangular,
    svd,
    total,
)

# Up to this short side a full decomposition is as fast.
DIRECT_SIDE = 512
# Beyond this share of the short side the space costs as much as the whole.
LARGEST_SPACE = 0.5
BLOCK = 16
# The space starts with so many times the rank and grows by this share between two looks at it.
FIRST, GROWTH = 1.5, 0.25
# The last growth lowered the squared error by less than this share of it (measured: what is left
# to gain is then below 1e-8 of it, since each growth gains less than a hundredth of the last), ...
SETTLED = 3e-5
# ... or by less than this share of the squared norm, which float32 products do not show.
INVISIBLE = 1e-12
# A column of a new block that keeps less than this of its length lies in the space already.
_DEPENDENT = {torch.float32: 1e-5, torch.float64: 1e-12}
_ROWS = 1 << 17
# A sketch forms X X^T from this ratio of rank times columns to the squared short side on, and looks
# at its space when that has so many times the rank.
_GRAM_SHARE, _LOOK = 1 / 8, 3
# One more of `BLOCK` columns a block for each so many triplets: so blocks gain alike at any rank.
_BLOCK_RANK = 40
# All blocks to come gain at most so many times what the next one does (measured: 1 to 4.5); a
# sketch ends when that is below the share of the squared error that is promised, ...
_BLOCKS_TO_COME, _SKETCHED = 4.5, 2e-3
# so many times less with each block, as a guess of when to look again, ...
_BLOCK_GAINS = 1.8
# ... and serves where the squared error is at least this share of the squared norm.
_COARSE = 1e-3
# A column that keeps less than this of its length outside the space takes more care.
_KEPT = 0.02
# Squares of float32 numbers below this, and above its inverse, are in range.
_SAFE = 2.0**20


class Leading(NamedTuple):
    """``U diag(sigma) V^T``, the leading singular triplets of X, in float64 (u and v of a sketch in
    the dtype of X).

    Of u and v the one on the longer side is orthonormal only as far as the space has settled.
    """

    u: Tensor  # (rows, k)
    sigma: Tensor  # (k,), descending
    v: Tensor  # (columns, k)
    rest: float  # Frobenius norm of what is left of X
    whole: float  # of X itself


def leading(x: Tensor, rank: int | None, exact: bool = True) -> Leading:
    r"""Return the `rank` leading singular triplets, min(rows, columns) at most; all with None.

    Their product is a best approximation: :math:`\|X - U \Sigma V^T\|_F`, which is measured, is
    above the least possible by at most about 1e-6 of it (or of :math:`\|X\|_F` in float32, where
    it is small).

    Args:
        x: (rows, columns), float32 or float64, finite. Scaled in place, and back.
        rank: k.
        exact: False for a sketch: an error that is above the least possible by up to 0.1% of it,
            also that of fewer triplets, and found from norms.
    """
    scale = power_of_two(x)  # exact, and keeps squares in range
    if not exact and 1 / _SAFE < scale < _SAFE:
        scale = 1.0
    k = min(x.shape) if rank is None else min(rank, *x.shape)
    tall = x.shape[0] > x.shape[1]
    if scale != 1.0:
        x.div_(scale)
    try:
        found = (_of_wide if exact else _sketched)(x.mT if tall else x, k)
    finally:
        if scale != 1.0:
            x.mul_(scale)
    u, v = (found.v, found.u) if tall else (found.u, found.v)
    return Leading(u, found.sigma * scale, v, found.rest * scale, found.whole * scale)


def factors(stack: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return sketches of stacked matrices: B, (n, rows, k), and A, (n, k, columns).

    Sigma is shared out evenly. Third are the squared singular values, summed over the matrices, on
    the CPU, (k,), and fourth the squared norm of all.
    """
    found = [leading(matrix, rank, exact=False) for matrix in stack]
    sigma = torch.stack([each.sigma for each in found])
    root = sigma.sqrt()[:, None, :]
    b, v = (torch.stack(each) * root for each in zip(*((f.u, f.v) for f in found), strict=True))
    squares = sigma.square().sum(dim=0).cpu().cummin(dim=0).values
    return b, v.mT, squares, sum(each.whole**2 for each in found)


def _of_wide(x: Tensor, rank: int) -> Leading:
    side = x.shape[0]
    if side <= DIRECT_SIDE:
        u, sigma, vh = svd(x.to(torch.float64))
        rest, whole = (float(torch.linalg.vector_norm(part)) for part in (sigma[rank:], sigma))
        return Leading(u[:, :rank], sigma[:rank], vh[:rank].mT, rest, whole)
    left = None
    if FIRST * rank + 2 * BLOCK <= LARGEST_SPACE * side:
        left = _lanczos(x, rank, SETTLED)
    if left is None:
        left = _by_gram(x, rank)
    else:  # one step of subspace iteration in float64 takes away the rounding of the basis
        across = _across(x, left.to(torch.float64))
        left = torch.cat([matmul(x[part].to(torch.float64), across) for part in _parts(x)])
    u, _ = qr(left)
    across = _across(x, u)  # X is cut to U U^T X
    sigma = torch.linalg.vector_norm(across, dim=0)
    squared = sum(total((x[part] - matmul(u[part], across.mT)).square_()) for part in _parts(x))
    v = across / sigma.masked_fill(sigma == 0, 1.0)
    return Leading(u, sigma, v, squared**0.5, _squared_norm(x) ** 0.5)


def _sketched(x: Tensor, rank: int) -> Leading:
    whole = norm(x) ** 2
    u = _krylov(x, rank, whole) if whole else None
    if u is None:
        return _of_wide(x, rank)
    across = matmul(u.mT, x)
    sigma = torch.linalg.vector_norm(across.to(torch.float64), dim=1)
    rest = whole - float(sigma.square().sum())
    if rest < _COARSE * whole:
        return _of_wide(x, rank)
    across /= sigma[:, None]
    sigma, order = sigma.sort(descending=True)
    return Leading(u[:, order], sigma, across[order].mT, rest**0.5, whole**0.5)


def _krylov(x: Tensor, rank: int, whole: float) -> Tensor | None:
    """The left vectors of a sketch, by block Lanczos in the dtype of x.

    None where more care is needed: little is left of x, or blocks become dependent.
    """
    side, width = x.shape[0], BLOCK * math.ceil(rank / _BLOCK_RANK)
    last = int(LARGEST_SPACE * side) // width * width
    look = max(_LOOK * rank, 2 * width)
    if look > last:
        return _by_gram(x, rank).to(x.dtype)
    squares = None
    if rank * x.shape[1] >= _GRAM_SHARE * side**2:
        squares = gram(x).tril_()
        squares += squares.tril(-1).mT
    # Q^T, by rows, and Q^T X X^T Q.
    basis, small = x.new_empty((last, side)), x.new_empty((last, last))
    generator = torch.Generator().manual_seed(0)
    block = _orthonormal(torch.randn((width, side), generator=generator).to(x), 0.0)
    for size in range(width, last + 1, width):
        if block is None:
            return None
        new, known = slice(size - width, size), basis[:size]
        basis[new] = block
        image = matmul(matmul(block, x), x.mT) if squares is None else matmul(block, squares)
        within = matmul(image, known.mT)
        small[new, :size], small[:size, new] = within, within.mT
        rest = image - matmul(within, known)
        if size >= look:
            values, vectors = (part[..., -rank:] for part in eigh(small[:size, :size]))
            error = whole - float(values.sum())
            if error < _COARSE * whole:
                return None
            # What the next block gains, to second order, and so what all may.
            lost = matmul(vectors[new].mT, rest).square().sum(dim=1)
            gaps = values - small[new, new].diagonal().mean()
            gain = float((lost / gaps.clamp(min=0.1 * float(values[-1]))).sum())
            excess = _BLOCKS_TO_COME * gain / (_SKETCHED * error)
            if excess <= 1.0:
                return matmul(known.mT, vectors.flip(1))
            look = min(size + math.ceil(math.log(excess, _BLOCK_GAINS)) * width, last)
        block = _orthonormal(rest, _KEPT * torch.linalg.vector_norm(image, dim=1))
    return _by_gram(x, rank).to(x.dtype)


def _orthonormal(rows: Tensor, least: Tensor | float) -> Tensor | None:
    """Orthonormal rows of the same span; None if one adds less than `least` to those before it."""
    wide = rows.to(torch.float64)
    factor, failed = cholesky(gram(wide))
    if int(failed) or bool((factor.diagonal() < least).any()):
        return None
    return solve_triangular(factor, wide, upper=False).to(rows.dtype)


def _across(x: Tensor, left: Tensor) -> Tensor:
    """``X^T U`` in float64."""
    across = left.new_zeros((x.shape[1], left.shape[1]))
    for part in _parts(x):
        across.add_(matmul(x[part].to(torch.float64).mT, left[part]))
    return across


def _squared_norm(x: Tensor) -> float:
    return sum(total(x[part].to(torch.float64).square_()) for part in _parts(x))


def _parts(x: Tensor) -> Iterator[slice]:
    """Slices of rows, so that x is never copied whole in float64."""
    step = max(1, _ROWS // x.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _by_gram(x: Tensor, rank: int) -> Tensor:
    """The left vectors from the eigenvectors of ``X X^T`` in float64."""
    squares = x.new_zeros((x.shape[0], x.shape[0]), dtype=torch.float64)
    for part in _parts(x.mT):
        squares.add_(gram(x[:, part].to(torch.float64)))
    _, vectors = eigh(squares)
    return vectors[:, -rank:].flip(1)


def _lanczos(x: Tensor, rank: int, settled: float) -> Tensor | None:
    """The left vectors; None if the space that it takes grows too large."""
    norm, side = _squared_norm(x), x.shape[0]
    if norm == 0.0:
        return torch.eye(side, rank, dtype=x.dtype, device=x.device)
    last = int(LARGEST_SPACE * side) + BLOCK
    # Q^T, by rows, Q^T X, and Q^T X X^T Q in float64.
    basis, across = x.new_empty((last, side)), x.new_empty((last, x.shape[1]))
    small = x.new_empty((last, last), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn((side, BLOCK), generator=generator).to(x)

    def outside(block: Tensor) -> Tensor:
        return block - matmul(basis[:size].mT, matmul(basis[:size], block))

    size, target, before = 0, int(FIRST * rank) + 2 * BLOCK, 0.0
    while target <= LARGEST_SPACE * side:
        while size < target:
            # The part of a block outside the space, orthonormal; random where there is none.
            block = matmul(x, across[size - BLOCK : size].mT) if size else random()
            lengths = torch.linalg.vector_norm(block, dim=0)
            block, triangle = qr(outside(block))
            lost = triangle.diagonal().abs() <= _DEPENDENT[x.dtype] * lengths
            if bool(lost.any()):
                block = torch.where(lost, random(), block)
            for _ in range(2):
                block, _ = qr(outside(block))
            new = slice(size, size + BLOCK)
            size = new.stop
            basis[new], across[new] = block.mT, matmul(block.mT, x)
            known = across[:size].to(torch.float64)
            products = matmul(across[new].to(torch.float64), known.mT)
            small[new, :size], small[:size, new] = products, products.mT
        values, vectors = eigh(small[:size, :size])
        kept = float(values[-rank:].clamp(min=0.0).sum())
        if kept - before <= max(settled * max(norm - kept, 0.0), INVISIBLE * norm):
            return matmul(basis[:size].mT, vectors[:, -rank:].flip(1).to(x.dtype))
        before, target = kept, size + max(2 * BLOCK, int(GROWTH * size))
    return None
