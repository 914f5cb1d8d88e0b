"""Singular value thresholding and rank truncation of one wide matrix, without an SVD.

Two ways that keep nothing between matrices: `Eigen`, from the eigendecomposition of a Gram matrix,
and `MatmulShrinker`, from matrix products alone. `svt_subspace` follows a matrix that moves slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import eigh, gram, matmul, norm, power_of_two
from mergekit_ext.kernels.precision import full_precision

# Eigenvalues of H - mu nearer to zero than this share of the largest keep an unsettled sign; the
# error is below half of it for each of them.
RESOLUTION = {torch.float32: 1e-5, torch.float64: 1e-10}
FLOAT32_NOISE = 1e-5
# Squarings for the largest singular value, and for a bound that may be 1.3 times as large.
SQUARINGS, BOUND_SQUARINGS = 20, 3


@dataclass(frozen=True)
class Shrunk:
    """A matrix after thresholding or truncation, its rank and the sum of its singular values."""

    value: Tensor
    rank: int
    nuclear: float


@dataclass(frozen=True)
class Rule:
    """How a matrix is shrunk: thresholded at `mu`, or cut to `rank`. One of them is set."""

    mu: float | None = None
    rank: int | None = None

    def apply(self, eigen: Eigen) -> Shrunk:
        if self.mu is not None:
            return eigen.threshold(self.mu)
        return eigen.truncate(self.rank or 0)


def gram_dtype(sigma_1: float, smallest: float, dtype: torch.dtype, accuracy: float) -> torch.dtype:
    """Return the cheapest dtype of a Gram matrix when singular values from `smallest` on matter.

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
    """Singular values and left singular vectors of a matrix, from its Gram matrix.

    With ``X = U diag(sigma) V^T`` and ``X X^T = U diag(sigma^2) U^T``, every function that shrinks
    singular values is ``U diag(c(sigma)) U^T X``: no right vectors, and an eigendecomposition of
    the short side. Squaring costs precision: an eigenvalue is off by about ``eps sigma_1^2``, a
    singular value by ``eps sigma_1^2 / (2 sigma)``; see `gram_dtype`.

    """

    matrix: Tensor  # (a, b), a <= b, not empty
    sigma: Tensor  # (a,), float64, ascending
    vectors: Tensor  # (a, a), in the dtype of the matrix
    floor: float  # below it a singular value may as well be zero

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype) -> Eigen:
        """Decompose a float32 or float64 matrix; `dtype` is that of the Gram matrix."""
        scale, length = power_of_two(matrix), matrix.shape[1]
        values, vectors = eigh(gram((matrix / scale).to(dtype)))
        sigma = values.double().clamp_(min=0.0).sqrt_() * scale
        floor = float(sigma[-1]) * (length * torch.finfo(dtype).eps) ** 0.5
        if dtype != matrix.dtype:
            floor = max(floor, float(sigma[-1]) * length * torch.finfo(matrix.dtype).eps)
        return cls(matrix, sigma, vectors.to(matrix.dtype), floor)

    def threshold(self, mu: float) -> Shrunk:
        """Return the singular value thresholding ``SVT(X; mu) = U diag((sigma - mu)^+) V^T``.

        Cai, Candes, Shen (2010), used by LoRE-Merging section 3.2. It is the proximal map
        ``argmin_D 1/2 ||D - X||_F^2 + mu ||D||_*``; ``mu >= 0``, and 0 returns the matrix.
        """
        if mu == 0.0:
            rank = int((self.sigma > self.floor).sum())
            return Shrunk(self.matrix.clone(), rank, float(self.sigma.sum()))
        kept = self.sigma > mu
        rank = int(kept.sum())
        nuclear = float((self.sigma - mu).clamp_(min=0.0).sum())
        # mask before dividing: a singular value of zero is never kept
        ratio = mu / torch.where(kept, self.sigma, torch.ones_like(self.sigma))
        return Shrunk(self._apply(1.0 - ratio, rank), rank, nuclear)

    def truncate(self, rank: int) -> Shrunk:
        """Return the best approximation of rank at most `rank` (Eckart and Young, 1936)."""
        rank = min(rank, int((self.sigma > self.floor).sum()))
        nuclear = float(self.sigma[len(self.sigma) - rank :].sum())
        return Shrunk(self._apply(torch.ones_like(self.sigma), rank), rank, nuclear)

    def _apply(self, factor: Tensor, rank: int) -> Tensor:
        """Return ``U diag(c) U^T X``: c is `factor` on the top `rank` triplets, 0 on the rest."""
        size = len(self.sigma)
        if rank == 0:
            return torch.zeros_like(self.matrix)
        top, rest = self.vectors[:, size - rank :], self.vectors[:, : size - rank]
        weight = factor[size - rank :].to(self.matrix.dtype)
        if 2 * rank <= size:
            return matmul(top, weight[:, None] * matmul(top.T, self.matrix))
        # mostly kept: fewer products (and exact where c = 1) from what is taken away
        removed = matmul(top * (1.0 - weight), top.T).add_(matmul(rest, rest.T))
        return self.matrix - matmul(removed, self.matrix)


class MatmulShrinker:
    r"""Shrinks ``(a, b)`` matrices with ``a <= b`` on devices where products are cheap.

    With the polar decomposition ``X = H P`` (``P = U V^T``, ``H = (X X^T)^(1/2) = X P^T``),

        SVT(X; mu) = (H - mu I)_+ P,    (M)_+ = (M + M sign(M)) / 2.

    P and sign are limits of ``Y <- rho/2 (3 Y - rho^2 Y Y^T Y)``: Newton-Schulz with the scaling
    ``rho^2 = 3 / (1 + l + l^2)`` that is best for singular values in ``[l, 1]`` (Chen and Chow
    2014, "A stable scaling of Newton-Schulz for improving the sign function computation of a
    Hermitian matrix"). P need only be right for singular values above mu, and sign for eigenvalues
    not near zero. X itself is iterated on, not its square, so that float32 loses no precision.

    Some 45 products in float32 at ``mu = 0.1 sigma_1``. The first calls use the dtype of the data,
    `settle` and everything after it float64. Scratch: four matrices of that dtype. Ranks (not
    thresholds) are cut with an eigendecomposition.
    """

    def __init__(self) -> None:
        self._rule = Rule(mu=0.0)
        self._precise = False

    @property
    def noise(self) -> float:
        """The error of `shrink` over the norm of its argument (measured: up to 1.1e-5)."""
        return 0.0 if self._precise else FLOAT32_NOISE

    def start(self, x: Tensor) -> float:
        """Return the largest singular value of the first matrix."""
        with full_precision():
            return spectral_norm(x, SQUARINGS)

    def first(self, x: Tensor, rule: Rule) -> Shrunk:
        """Shrink the first matrix; `rule` stays for the later ones."""
        self._rule = rule
        return self.shrink(x)

    def shrink(self, x: Tensor) -> Shrunk:
        if not self._rule.mu:
            return self._rule.apply(Eigen.of(x, torch.float64))
        with full_precision():
            if not self._precise or x.dtype == torch.float64:
                return threshold(x, self._rule.mu)
            exact = threshold(x.double(), self._rule.mu)
            return replace(exact, value=exact.value.to(x.dtype))

    def follow(self, factor: float) -> None:
        """Multiply the threshold."""
        self._rule = Rule(mu=factor * (self._rule.mu or 0.0))

    def settle(self, x: Tensor, accuracy: float) -> Shrunk:
        """Shrink `x` in float64, and what comes after it too."""
        self._precise = True
        return self.shrink(x)


def threshold(x: Tensor, mu: float) -> Shrunk:
    """Return ``SVT(X; mu)`` of ``(a, b)``, ``a <= b``, for ``mu > 0``, in the dtype of `x`."""
    bound = 1.0001 * spectral_norm(x, BOUND_SQUARINGS)
    if bound <= mu:
        return Shrunk(torch.zeros_like(x), 0, 0.0)
    level = mu / bound
    scaled = x / bound
    polar = _orthogonalised(scaled, 0.9 * level)
    half = scaled @ polar.T
    shifted = (half + half.T).mul_(0.5)
    # sigma/bound - level is in [-level, 1 - level]; scaled to [-1, 1]
    shifted.diagonal().sub_(level)
    sign = _orthogonalised(shifted / (max(level, 1.0 - level) * 1.001), RESOLUTION[x.dtype])
    rank = round(0.5 * float(sign.diagonal().double().sum() + len(sign)))
    if rank <= 0:
        return Shrunk(torch.zeros_like(x), 0, 0.0)
    positive = (shifted + shifted @ sign).mul_(0.5)
    nuclear = float(positive.diagonal().double().sum()) * bound
    return Shrunk((positive @ polar).mul_(bound), rank, nuclear)


def spectral_norm(x: Tensor, squarings: int) -> float:
    """Return ``||(X X^T)^k||_F^(1/2k)`` of ``(a, b)``, ``k = 2^squarings``.

    That is the largest singular value times at most ``a^(1/4k)``.
    """
    size = norm(x)
    if size == 0.0:
        return 0.0
    scaled = x / size
    power = scaled @ scaled.T
    logarithm, exponent = 0.0, 2.0
    for _ in range(squarings):
        length = norm(power)
        power = power / length
        logarithm += math.log(length) / exponent
        power, exponent = power @ power, 2.0 * exponent
    return size * math.exp(logarithm + math.log(norm(power)) / exponent)


def _orthogonalised(y: Tensor, lower: float) -> Tensor:
    """Singular values in ``[lower, 1]`` to 1, smaller ones to something in ``[0, 1]``."""
    eps = torch.finfo(y.dtype).eps
    settling = 0
    while settling < 2:
        squared = 3.0 / (1.0 + lower + lower * lower)
        rho = math.sqrt(squared)
        product = (y @ y.T).mul_(-0.5 * rho * squared)
        product.diagonal().add_(1.5 * rho)
        y = product @ y
        lower = min(0.5 * rho * lower * (3.0 - squared * lower * lower), 1.0)
        settling += 1.0 - lower < math.sqrt(eps)
    return y
