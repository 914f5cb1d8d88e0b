"""Thresholding of a slowly moving matrix: the subspace above mu is kept from call to call.

Thresholding needs the left subspace of the singular values above mu, and last time's is a good
start: a Chebyshev polynomial of ``X X^T`` that damps everything below the subspace (degree 1 to 4),
then the Rayleigh-Ritz problem in the small space.

What this can miss is a direction that has grown above mu outside the space. Three things prevent
it: guard vectors must stay below mu (otherwise the space is rebuilt from an eigendecomposition);
`settle` repeats the step on one matrix until the result stops moving; and `complete` *proves*, by
a Cholesky factorisation of ``mu^2 I - R R^T`` for the remainder R, that ``||R||_2 <= mu``.
"""

import math

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import (
    cholesky,
    eigh,
    gram,
    matmul,
    norm,
    qr,
    solve_triangular,
)
from mergekit_ext.kernels.svt import Eigen, Rule, Shrunk, gram_dtype

# An eigendecomposition of order a takes as long as products of so many a^3 operations (CPU).
EIGEN_COST = 10.0
# Guard vectors: a share of the rank, at most a share of the short side, and at least a few.
GUARD_SHARE, GUARD_MOST, GUARD_LEAST = 0.3, 0.03, 12
# Error of a shrinking factor that float32 Gram matrices may cause; see `gram_dtype`.
FACTOR_ACCURACY = 1e-5
# The proof of completeness leaves this much of mu^2 to rounding.
COMPLETE_SLACK = 1e-4
# A direction at mu should gain this much on the damped ones in one call.
WANTED_GAIN, LARGEST_DEGREE = 3.0, 4
# Columns of the filtered basis may differ in size by this much before float32 loses them.
LARGEST_SPREAD = 1e5
# Least diagonal of a Cholesky factor, columns of norm 1, for which it may stand in for QR.
WELL_CONDITIONED = 0.3
# Settling takes one or two steps; after some more an eigendecomposition is cheaper.
SETTLE_STEPS = 3
ROUNDING = 16.0


class WarmShrinker:
    """Shrinks ``(a, b)`` matrices with ``a <= b``, each one near the one before.

    Holds the basis, about half an ``(a, a)`` matrix at most, between calls. Scratch: two tensors,
    four with float64 Gram matrices of float32 data. Ranks (not thresholds) are cut with an
    eigendecomposition each time.
    """

    noise = 0.0  # see MatmulShrinker: here errors sink with the steps, no more is needed

    def __init__(self) -> None:
        self._rule = Rule(mu=0.0)
        self._gram = torch.float64
        self._eigen: Eigen | None = None
        self._basis: Tensor | None = None
        self._ritz = torch.zeros(1, dtype=torch.float64)  # singular values of the basis
        self._exact = False  # whether the last result is from an eigendecomposition

    def start(self, x: Tensor) -> float:
        """Decompose the first matrix and return its largest singular value."""
        self._eigen = Eigen.of(x, x.dtype)
        return float(self._eigen.sigma[-1])

    def first(self, x: Tensor, rule: Rule) -> Shrunk:
        """Shrink the matrix that was given to `start`; `rule` stays for the later ones."""
        eigen, self._eigen = self._eigen or Eigen.of(x, x.dtype), None
        self._rule = rule
        smallest = rule.mu
        if smallest is None:
            smallest = float(eigen.sigma[-rule.rank]) if rule.rank else 0.0
        self._gram = gram_dtype(float(eigen.sigma[-1]), smallest, x.dtype, FACTOR_ACCURACY)
        return self._from_eigen(eigen) if self._gram == x.dtype else self._afresh(x)

    def shrink(self, x: Tensor) -> Shrunk:
        """Shrink `x`; approximate where the subspace is still moving."""
        if self._basis is None or self._rule.mu is None:
            return self._afresh(x)
        mu = self._rule.mu
        basis = orthonormal(self._filtered(x, self._basis, mu))
        inner = matmul(basis.T, x)
        values, vectors = eigh(gram(inner.to(self._gram)))
        sigma = values.double().clamp_(min=0.0).sqrt_()
        size, rank = len(sigma), int((sigma > mu).sum())
        if size - rank < GUARD_LEAST // 2:
            return self._afresh(x)
        surplus = size - rank - _guard(rank, x.shape[0])
        if surplus > 0:  # the rank has sunk
            sigma, vectors, size = sigma[surplus:], vectors[:, surplus:], size - surplus
        vectors = vectors.to(x.dtype)
        self._basis = matmul(basis, vectors)
        self._exact = False
        self._ritz = sigma
        kept = sigma[size - rank :]
        weight = (1.0 - mu / kept).to(x.dtype)
        left, right = self._basis[:, size - rank :], vectors[:, size - rank :]
        value = matmul(left * weight, matmul(right.T, inner))
        return Shrunk(value, rank, float((kept - mu).sum()))

    def follow(self, factor: float) -> None:
        """Multiply the threshold, and expect singular values below it as many times as large."""
        mu = self._rule.mu or 0.0
        self._rule = Rule(mu=factor * mu)
        self._ritz = self._ritz + (factor - 1.0) * self._ritz.clamp(max=mu)

    def settle(self, x: Tensor, accuracy: float) -> Shrunk:
        """Shrink `x` until a step moves the result by at most `accuracy`; nothing missed.

        Rounding alone moves it by about 10 eps ``||X||_F``: no less than `ROUNDING` is asked for.
        """
        result = self.shrink(x)
        if self._exact:
            return result
        accuracy = max(accuracy, ROUNDING * torch.finfo(x.dtype).eps * norm(x))
        for _ in range(SETTLE_STEPS):
            before, result = result, self.shrink(x)
            moved = norm(result.value - before.value)
            if self._exact or (moved <= accuracy and self.complete(x)):
                return result
        return self._afresh(x)

    def complete(self, x: Tensor) -> bool:
        """Return whether no singular value outside the basis exceeds mu (up to rounding)."""
        assert self._basis is not None and self._rule.mu is not None
        rest = x - matmul(self._basis, matmul(self._basis.T, x))
        gap = gram(rest).neg_()
        gap.diagonal().add_(self._rule.mu**2 * (1.0 + COMPLETE_SLACK))
        return int(cholesky(gap)[1]) == 0

    def _filtered(self, x: Tensor, basis: Tensor, mu: float) -> Tensor:
        """``p(X X^T) Q`` with columns of norm 1, p Chebyshev, at most 1 on ``[0, edge^2]``.

        Columns are in ascending order of their singular values; those far above the edge gain
        enough from a lower degree than those near it.
        """
        edge = float(self._ritz[0])
        if edge <= 0.0:
            return _normalised(matmul(x, matmul(x.T, basis)))
        degree = _degree(mu / edge, float(self._ritz[-1]) / edge)
        scale = 2.0 / edge**2
        result = (matmul(x, matmul(x.T, basis))).mul_(scale).sub_(basis)
        before, now = basis, result
        for done in range(1, degree):
            left = _unsatisfied(self._ritz / edge, done)
            if left == 0:
                break
            before, now = before[:, :left], now[:, :left]
            after = (matmul(x, matmul(x.T, now))).mul_(scale).sub_(now).mul_(2.0).sub_(before)
            before, now = now.clone(), after
            result[:, :left] = after
        return _normalised(result)

    def _afresh(self, x: Tensor) -> Shrunk:
        return self._from_eigen(Eigen.of(x, self._gram))

    def _from_eigen(self, eigen: Eigen) -> Shrunk:
        result = self._rule.apply(eigen)
        self._basis, self._exact = None, True
        if self._rule.mu:
            rows, columns = eigen.matrix.shape
            size = result.rank + _guard(result.rank, rows)
            if _pays(rows, columns, size):
                self._basis = eigen.vectors[:, rows - size :].clone()
                self._ritz = eigen.sigma[rows - size :].clone()
        return result


def orthonormal(y: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of `y`, which have norm 1.

    Filtered singular vectors are nearly orthogonal already: then a Cholesky factorisation of
    ``Y^T Y`` is exact enough and costs a fraction of Householder's QR.
    """
    factor, failed = cholesky(gram(y.T))
    if int(failed) == 0 and float(factor.diagonal().min()) > WELL_CONDITIONED:
        return solve_triangular(factor.T, y, upper=True, left=False)
    return qr(y)[0]


def _pays(rows: int, columns: int, size: int) -> bool:
    """Return whether a step with `size` vectors takes fewer operations than `Eigen`.

    Counted: two filter steps, the small problem and the result, against the Gram matrix, its
    eigenvectors and the result.
    """
    area = rows * columns
    step = 12.0 * area * size + (2.0 * columns + 5.0 * rows + EIGEN_COST * size) * size**2
    whole = 2.0 * area * rows + EIGEN_COST * rows**3 + 4.0 * area * min(size, rows - size)
    return step < whole


def _guard(rank: int, rows: int) -> int:
    return max(GUARD_LEAST, min(round(GUARD_SHARE * rank), round(GUARD_MOST * rows)))


def _normalised(y: Tensor) -> Tensor:
    return y / torch.linalg.vector_norm(y, dim=0).clamp_(min=torch.finfo(y.dtype).tiny)


def _unsatisfied(ratio: Tensor, degree: int) -> int:
    """How many of the ascending ``sigma/edge`` gain less than wanted from this degree."""
    gain = torch.cosh(degree * torch.acosh((2.0 * ratio**2 - 1.0).clamp(min=1.0)))
    return int((gain < WANTED_GAIN).sum())


def _degree(gap: float, spread: float) -> int:
    """The least degree that reaches `WANTED_GAIN` at ``gap = mu/edge``, within the spread."""
    if gap <= 1.0:
        return 1
    at_threshold = math.acosh(2.0 * gap**2 - 1.0)
    at_peak = math.acosh(max(2.0 * spread**2 - 1.0, 1.0))
    degree = 1
    while (
        degree < LARGEST_DEGREE
        and math.cosh(degree * at_threshold) < WANTED_GAIN
        and (degree + 1) * at_peak < math.log(2.0 * LARGEST_SPREAD)
    ):
        degree += 1
    return degree
