"""Singular value thresholding and rank truncation of one matrix, without a full SVD.

Both are spectral functions of the small Gram matrix. With ``X = U diag(sigma) V^T`` and rows the
shorter side, ``G = X X^T = U diag(sigma^2) U^T``, so that every function that shrinks singular
values is ``U diag(c(sigma)) U^T X`` with a factor ``c`` for each of them: no right vectors, and an
eigendecomposition of the small side instead of an SVD of the whole.

Squaring costs precision: an eigenvalue of ``G`` is off by about ``eps * sigma_1^2``, a singular
value by ``eps * sigma_1^2 / (2 sigma)``. `Eigen` therefore names the dtype of ``G``: float64 is
the default and always safe for float32 data; `gram_dtype` says when float32 is good enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import eigh, gram, matmul
from mergekit_ext.kernels.numerics import compute_dtype


@dataclass(frozen=True)
class Shrunk:
    """A matrix after thresholding or truncation, and what was learned on the way.

    Attributes:
        value: the shrunk matrix, shape and dtype of the input.
        rank: number of singular values kept.
        nuclear: sum of the singular values of `value`.
        spectral_norm: largest singular value of the *input*, or a bound where it says so.
    """

    value: Tensor
    rank: int
    nuclear: float
    spectral_norm: float


def svt(x: Tensor, mu: float) -> Shrunk:
    """Singular value thresholding: ``SVT(X; mu) = U diag((sigma - mu)^+) V^T``.

    Cai, Candes, Shen (2010), used by LoRE-Merging section 3.2. It is the proximal map
    ``argmin_D 1/2 ||D - X||_F^2 + mu ||D||_*``.

    Args:
        x: a real matrix ``(a, b)``, either side may be empty. Half precision is computed (and
            returned) in float32; the Gram matrix is float64.
        mu: threshold, ``>= 0``. With 0 the matrix comes back as it is.

    Raises:
        ValueError: `x` is not a matrix, or `mu` is negative or not finite.
    """
    if not 0.0 <= mu < float("inf"):
        raise ValueError(f"mu: found {mu!r}; expected a finite number >= 0")
    matrix = _as_matrix(x)
    if matrix.numel() == 0:
        return Shrunk(matrix.clone(), 0, 0.0, 0.0)
    eigen = Eigen.of(matrix, torch.float64)
    return eigen.threshold(mu)


def truncate(x: Tensor, rank: int) -> Shrunk:
    """Best approximation of `x` of rank at most `rank` (Eckart and Young, 1936).

    Shapes, dtypes and errors as in `svt`. Numerically zero singular values are not counted.
    """
    if rank < 0:
        raise ValueError(f"rank: found {rank!r}; expected an integer >= 0")
    matrix = _as_matrix(x)
    if matrix.numel() == 0:
        return Shrunk(matrix.clone(), 0, 0.0, 0.0)
    return Eigen.of(matrix, torch.float64).truncate(rank)


def gram_dtype(sigma_1: float, smallest: float, dtype: torch.dtype, accuracy: float) -> torch.dtype:
    """The cheapest dtype for the Gram matrix when singular values down to `smallest` matter.

    The factor ``c(sigma) = 1 - mu/sigma`` is a function of ``sigma^2`` with slope at most
    ``1/(2 mu^2)``; an error ``eps sigma_1^2`` of the eigenvalue moves it by
    ``eps/2 (sigma_1/mu)^2``. float32 is taken when that stays below `accuracy`.
    """
    if dtype == torch.float64 or smallest <= 0.0:
        return torch.float64
    error = 0.5 * torch.finfo(torch.float32).eps * (sigma_1 / smallest) ** 2
    return torch.float32 if error <= accuracy else torch.float64


@dataclass(frozen=True)
class Eigen:
    """Left singular vectors and singular values of a matrix, from its small Gram matrix.

    `short` is the matrix seen with its shorter side as rows (a transposed view if need be),
    `vectors` its left singular vectors ``(rows, rows)`` in ascending order of `sigma`.
    """

    short: Tensor
    transposed: bool
    sigma: Tensor
    vectors: Tensor
    floor: float

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype) -> Eigen:
        """Decompose a non-empty float matrix; `dtype` is that of the Gram matrix."""
        transposed = matrix.shape[0] > matrix.shape[1]
        short = matrix.T if transposed else matrix
        scale = power_of_two(matrix)
        scaled = (short / scale).to(dtype)
        values, vectors = eigh(gram(scaled))
        sigma = values.double().clamp_(min=0.0).sqrt_() * scale
        # below this a singular value may as well be zero: rounding of G, square-rooted
        floor = float(sigma[-1]) * (max(short.shape) * torch.finfo(dtype).eps) ** 0.5
        if dtype != matrix.dtype:
            floor = max(floor, float(sigma[-1]) * max(short.shape) * torch.finfo(matrix.dtype).eps)
        return cls(short, transposed, sigma, vectors.to(matrix.dtype), floor)

    @property
    def spectral_norm(self) -> float:
        return float(self.sigma[-1])

    def kth(self, rank: int | None) -> float:
        """The `rank`-th largest singular value (0 for rank 0)."""
        return float(self.sigma[len(self.sigma) - rank]) if rank else 0.0

    def top(self, count: int) -> Tensor:
        """The left singular vectors of the `count` largest singular values."""
        return self.vectors[:, len(self.sigma) - count :].clone()

    def threshold(self, mu: float) -> Shrunk:
        """Singular value thresholding at `mu`."""
        if mu == 0.0:
            kept = self.sigma > self.floor
            return self._result(self.short.clone(), int(kept.sum()), float(self.sigma.sum()))
        kept = self.sigma > mu
        rank = int(kept.sum())
        nuclear = float((self.sigma - mu).clamp_(min=0.0).sum())
        # mask before dividing: a singular value of zero is never kept
        ratio = mu / torch.where(kept, self.sigma, torch.ones_like(self.sigma))
        return self._result(self._apply(1.0 - ratio, rank), rank, nuclear)

    def truncate(self, rank: int) -> Shrunk:
        """The `rank` largest singular triplets."""
        rank = min(rank, int((self.sigma > self.floor).sum()))
        nuclear = float(self.sigma[len(self.sigma) - rank :].sum())
        return self._result(self._apply(torch.ones_like(self.sigma), rank), rank, nuclear)

    def _apply(self, factor: Tensor, rank: int) -> Tensor:
        """``U diag(c) U^T X`` with c = `factor` on the top `rank` triplets and 0 on the rest."""
        size = len(self.sigma)
        if rank == 0:
            return torch.zeros_like(self.short)
        top, rest = self.vectors[:, size - rank :], self.vectors[:, : size - rank]
        weight = factor[size - rank :].to(self.short.dtype)
        if 2 * rank <= size:
            return matmul(top, weight[:, None] * matmul(top.T, self.short))
        # mostly kept: fewer products (and exact where c = 1) from what is taken away
        removed = matmul(top * (1.0 - weight), top.T).add_(matmul(rest, rest.T))
        return self.short - matmul(removed, self.short)

    def _result(self, short: Tensor, rank: int, nuclear: float) -> Shrunk:
        value = short.T.contiguous() if self.transposed else short
        return Shrunk(value, rank, nuclear, float(self.sigma[-1]))


@dataclass(frozen=True)
class Rule:
    """How a matrix is shrunk: thresholded at `mu`, or cut to `rank`. One of them is set."""

    mu: float | None = None
    rank: int | None = None

    def apply(self, eigen: Eigen) -> Shrunk:
        if self.mu is not None:
            return eigen.threshold(self.mu)
        return eigen.truncate(self.rank or 0)


def power_of_two(matrix: Tensor) -> float:
    """A power of two within a factor 2 of the largest entry (1 for zeros), to scale by exactly."""
    peak = float(matrix.abs().max()) if matrix.numel() else 0.0
    return 2.0 ** math.floor(math.log2(peak)) if peak > 0.0 else 1.0


def _as_matrix(x: Tensor) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"x: found {x.ndim} axes; expected a matrix (2 axes)")
    return x.to(compute_dtype([x]))
