r"""Truncation: which rank a merged change gets, and its best approximation of that rank.

`leading` finds the leading singular triplets of a dense matrix without its full decomposition, by
block Lanczos on :math:`X X^T` from random vectors, every block orthogonalised against all others
(Golub, Luk and Overton 1981, "A Block Lanczos Method for Computing the Singular Values and
Corresponding Singular Vectors of a Matrix"). The approximation from the space found so far can
only get better as it grows; it grows until it hardly does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import eigh, gram, matmul, qr, svd, total

# Of the arithmetic in which singular values of cores are found.
EPS = torch.finfo(torch.float64).eps

# So many leading directions, all that are not rounding, or as many as hold this share of the sum
# of squares: {"energy": 0.99}.
Rank = int | Literal["lossless"] | Mapping[str, float]

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


@dataclass(frozen=True)
class Factored:
    """Balanced factors of a merged module: ``B A`` with the roots of sigma on both sides.

    Attributes:
        a: (n, r, columns), float64.
        b: (n, rows, r), float64.
        sigma: (n, r) singular values that are kept, zeros where a matrix has fewer.
        error: relative Frobenius error of the truncation over the whole module, exact from the
            singular values that are dropped.
    """

    a: Tensor
    b: Tensor
    sigma: Tensor
    error: float

    @property
    def rank(self) -> int:
        return int(self.sigma.shape[1])


def chosen(sigma: Tensor, rank: Rank, floor: float) -> int:
    r"""Return one rank for all matrices of a module; at least 1, which PEFT needs.

    Args:
        sigma: (n, k) singular values of each matrix, in descending order.
        rank: as asked for. "lossless": the largest numerical rank. ``{"energy": e}``: the
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
    """Return `factor` with zeros behind it along `dim` up to `rank`."""
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


@dataclass(frozen=True)
class Leading:
    """``U diag(sigma) V^T``, the leading singular triplets of X.

    Attributes:
        u: (rows, k), float64.
        sigma: (k,), descending.
        v: (columns, k). Of u and v the one on the longer side is orthonormal only as far as the
            space has settled.
        rest: Frobenius norm of what is left of X.
        whole: of X itself.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor
    rest: float
    whole: float


def leading(x: Tensor, rank: int | None) -> Leading:
    r"""Return the `rank` leading singular triplets; all of them with None.

    Args:
        x: (rows, columns), float32 or float64, finite. Scaled in place, and back.
        rank: k; at most ``min(rows, columns)`` are returned.

    Returns:
        triplets whose product is a best approximation: :math:`\|X - U \Sigma V^T\|_F` is above the
        least possible by at most about 1e-6 of it (or of :math:`\|X\|_F` in float32, where it is
        small). `rest` is measured.
    """
    # A power of two is exact, and keeps squares in range. abs() would make a copy of x.
    peak = max(float(x.max()), -float(x.min())) if x.numel() else 0.0
    scale = 2.0 ** math.floor(math.log2(peak)) if peak > 0.0 else 1.0
    k = min(x.shape) if rank is None else min(rank, *x.shape)
    tall = x.shape[0] > x.shape[1]
    x.div_(scale)
    try:
        found = _of_wide(x.mT if tall else x, k)
    finally:
        x.mul_(scale)
    u, v = (found.v, found.u) if tall else (found.u, found.v)
    return Leading(u, found.sigma * scale, v, found.rest * scale, found.whole * scale)


def _of_wide(x: Tensor, rank: int) -> Leading:
    """Of a matrix with no more rows than columns."""
    side = x.shape[0]
    if side <= DIRECT_SIDE:
        u, sigma, vh = svd(x.to(torch.float64))
        rest, whole = (float(torch.linalg.vector_norm(part)) for part in (sigma[rank:], sigma))
        return Leading(u[:, :rank], sigma[:rank], vh[:rank].mT, rest, whole)
    left = None
    if FIRST * rank + 2 * BLOCK <= LARGEST_SPACE * side:
        left = _lanczos(x, rank)
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


def _across(x: Tensor, left: Tensor) -> Tensor:
    """``X^T U`` in float64."""
    across = left.new_zeros((x.shape[1], left.shape[1]))
    for part in _parts(x):
        across.add_(matmul(x[part].to(torch.float64).mT, left[part]))
    return across


def _squared_norm(x: Tensor) -> float:
    """In float64, without a copy of x in it."""
    return sum(total(x[part].to(torch.float64).square_()) for part in _parts(x))


def _parts(x: Tensor) -> Iterator[slice]:
    """Slices of rows."""
    step = max(1, _ROWS // x.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _by_gram(x: Tensor, rank: int) -> Tensor:
    """The left vectors from the eigenvectors of ``X X^T`` in float64."""
    squares = x.new_zeros((x.shape[0], x.shape[0]), dtype=torch.float64)
    for part in _parts(x.mT):
        squares.add_(gram(x[:, part].to(torch.float64)))
    _, vectors = eigh(squares)
    return vectors[:, -rank:].flip(1)


def _lanczos(x: Tensor, rank: int) -> Tensor | None:
    """The left vectors; None if the space that it takes grows too large."""
    norm = _squared_norm(x)
    if norm == 0.0:
        return torch.eye(x.shape[0], rank, dtype=x.dtype, device=x.device)
    space = _Space(x)
    target, before = int(FIRST * rank) + 2 * BLOCK, 0.0
    while target <= LARGEST_SPACE * x.shape[0]:
        space.grow(target)
        values, vectors = eigh(space.gram)
        kept = float(values[-rank:].clamp(min=0.0).sum())
        error = max(norm - kept, 0.0)
        if kept - before <= max(SETTLED * error, INVISIBLE * norm):
            return matmul(space.basis.mT, vectors[:, -rank:].flip(1).to(x.dtype))
        before = kept
        target = space.size + max(2 * BLOCK, int(GROWTH * space.size))
    return None


class _Space:
    """An orthonormal basis Q^T of the Krylov space, ``Q^T X``, and ``Q^T X X^T Q`` in float64."""

    def __init__(self, x: Tensor):
        self._x = x
        self.basis = x.new_empty((0, x.shape[0]))
        self._across = x.new_empty((0, x.shape[1]))
        self.gram = x.new_empty((0, 0), dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)
        self.size = 0

    def grow(self, target: int) -> None:
        """Add blocks until the space has at least `target` dimensions."""
        whole = self.size + math.ceil((target - self.size) / BLOCK) * BLOCK
        self.basis = padded(self.basis, whole, 0)
        self._across = padded(self._across, whole, 0)
        self.gram = padded(padded(self.gram, whole, 0), whole, 1)
        while self.size < whole:
            if self.size:
                last = self._across[self.size - BLOCK : self.size]
                self._add(self._fresh(matmul(self._x, last.mT)))
            else:
                self._add(self._fresh(self._random()))

    def _random(self) -> Tensor:
        drawn = torch.randn((self._x.shape[0], BLOCK), generator=self._generator)
        return drawn.to(self._x)

    def _fresh(self, block: Tensor) -> Tensor:
        """The part of a block outside the space, orthonormal; random where there is none."""
        lengths = torch.linalg.vector_norm(block, dim=0)
        block, triangle = qr(self._outside(block))
        lost = triangle.diagonal().abs() <= _DEPENDENT[block.dtype] * lengths
        if bool(lost.any()):
            block = torch.where(lost, self._random(), block)
        block, _ = qr(self._outside(block))
        return qr(self._outside(block))[0]

    def _outside(self, block: Tensor) -> Tensor:
        basis = self.basis[: self.size]
        return block - matmul(basis.mT, matmul(basis, block))

    def _add(self, block: Tensor) -> None:
        new = slice(self.size, self.size + BLOCK)
        self.size = new.stop
        self.basis[new] = block.mT
        self._across[new] = matmul(block.mT, self._x)
        known = self._across[: self.size].to(torch.float64)
        products = matmul(self._across[new].to(torch.float64), known.mT)
        self.gram[new, : self.size] = products
        self.gram[: self.size, new] = products.mT
