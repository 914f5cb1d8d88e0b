r"""The leading singular triplets of a dense matrix, without its full decomposition.

Block Lanczos on :math:`X X^T` from random vectors, every block orthogonalised against all others
(Golub, Luk and Overton 1981, "A Block Lanczos Method for Computing the Singular Values and
Corresponding Singular Vectors of a Matrix"). The approximation from the space found so far can
only get better as it grows; it grows until it hardly does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_ext.kernels.linear_algebra import eigh, gram, matmul, power_of_two, qr, svd, total

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
_NEARLY_SETTLED = 1e-3
# ... or by less than this share of the squared norm, which float32 products do not show.
INVISIBLE = 1e-12
# A column of a new block that keeps less than this of its length lies in the space already.
_DEPENDENT = {torch.float32: 1e-5, torch.float64: 1e-12}
_ROWS = 1 << 17


class Leading(NamedTuple):
    """``U diag(sigma) V^T``, the leading singular triplets of X, in float64.

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
        exact: False for a third of the time: an error that is above the least possible by up to
            0.1% of it, and found from norms.
    """
    scale = power_of_two(x)  # exact, and keeps squares in range
    k = min(x.shape) if rank is None else min(rank, *x.shape)
    tall = x.shape[0] > x.shape[1]
    x.div_(scale)
    try:
        found = (_of_wide if exact else _sketched)(x.mT if tall else x, k)
    finally:
        x.mul_(scale)
    u, v = (found.v, found.u) if tall else (found.u, found.v)
    return Leading(u, found.sigma * scale, v, found.rest * scale, found.whole * scale)


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
    left = None
    if FIRST * rank + 2 * BLOCK <= LARGEST_SPACE * x.shape[0]:
        left = _lanczos(x, rank, _NEARLY_SETTLED)
    u, _ = qr((_by_gram(x, rank) if left is None else left).to(torch.float64))
    across = matmul(x.mT, u.to(x.dtype)).to(torch.float64)
    sigma = torch.linalg.vector_norm(across, dim=0)
    sigma, order = sigma.sort(descending=True)
    v = across[:, order] / sigma.masked_fill(sigma == 0, 1.0)
    whole = _squared_norm(x)
    rest = max(whole - float(sigma.square().sum()), 0.0)
    return Leading(u[:, order], sigma, v, rest**0.5, whole**0.5)


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
        if kept - before <= max(settled * error, INVISIBLE * norm):
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
        new = whole - self.size
        self.basis = pad(self.basis, (0, 0, 0, new))
        self._across = pad(self._across, (0, 0, 0, new))
        self.gram = pad(self.gram, (0, new, 0, new))
        while self.size < whole:
            last = self._across[self.size - BLOCK : self.size]
            self._add(self._fresh(matmul(self._x, last.mT) if self.size else self._random()))

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
