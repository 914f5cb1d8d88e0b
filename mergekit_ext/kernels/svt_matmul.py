"""Singular value thresholding from matrix products alone, for devices where those are cheap.

With the polar decomposition ``X = H P`` (``P = U V^T``, ``H = (X X^T)^(1/2) = X P^T``),

    SVT(X; mu) = (H - mu I)_+ P,    (M)_+ = (M + M sign(M)) / 2.

P and sign are limits of ``Y <- rho/2 (3 Y - rho^2 Y Y^T Y)``: Newton-Schulz with the scaling
``rho^2 = 3 / (1 + l + l^2)`` that is best for singular values in ``[l, 1]`` (Chen and Chow 2014,
"A stable scaling of Newton-Schulz for improving the sign function computation of a Hermitian
matrix"). P need only be right for singular values above mu, since the projection takes away the
others; and sign may be wrong for eigenvalues within a small distance of zero, where ``M sign(M)``
is small whatever the sign. X itself is iterated on, not its square, so that float32 loses no
precision to a squared condition number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_ext.kernels.svt import Eigen, Rule, Shrunk

# Eigenvalues of H - mu nearer to zero than this share of the largest keep an unsettled sign; the
# error is below half of it for each of them.
RESOLUTION = {torch.float32: 1e-5, torch.float64: 1e-10}
FLOAT32_NOISE = 1e-5
# Squarings that single out the largest singular value: only those within about 1e-6 of it remain
# mixed in, which moves a Rayleigh quotient by less than that.
SQUARINGS = 20
# Squarings for a bound that is too large by at most ``a^(1/32)`` (1.3 for a = 4096).
BOUND_SQUARINGS = 3


class MatmulShrinker:
    """Shrinks ``(a, b)`` matrices with ``a <= b``; no subspace is kept between calls.

    About 2 products per factor 2.6 in ``sigma_1/mu`` and in ``1/RESOLUTION``, and 7 more: some 45
    in float32 at ``mu = 0.1 sigma_1``. The first calls use the dtype of the data, `settle` and
    everything after it float64. Scratch: four matrices of that dtype. Ranks (not thresholds) are
    cut with an eigendecomposition.
    """

    def __init__(self) -> None:
        self._rule = Rule(mu=0.0)
        self._precise = False

    @property
    def noise(self) -> float:
        """Error of `shrink` over the norm of its argument (measured: up to 1.1e-5 in float32)."""
        return 0.0 if self._precise else FLOAT32_NOISE

    def start(self, x: Tensor) -> float:
        """The largest singular value of the first matrix."""
        with full_precision():
            return spectral_norm(x)

    def first(self, x: Tensor, rule: Rule) -> Shrunk:
        """Shrink the first matrix; `rule` stays for the later ones."""
        self._rule = rule
        return self.shrink(x)

    def shrink(self, x: Tensor) -> Shrunk:
        """Shrink `x`, whatever came before."""
        if not self._rule.mu:
            return self._rule.apply(Eigen.of(x, torch.float64))
        with full_precision():
            if not self._precise or x.dtype == torch.float64:
                return threshold(x, self._rule.mu)
            exact = threshold(x.double(), self._rule.mu)
            return replace(exact, value=exact.value.to(x.dtype))

    def settle(self, x: Tensor, accuracy: float, last: Shrunk | None = None) -> Shrunk:
        """Shrink `x` in float64, and what comes after it too."""
        self._precise = True
        return self.shrink(x)


def threshold(x: Tensor, mu: float) -> Shrunk:
    """``SVT(X; mu)`` for ``(a, b)`` with ``a <= b`` and ``mu > 0``, in the dtype of `x`.

    `Shrunk.spectral_norm` is an upper bound here, see `norm_bound`; `spectral_norm` is the value.
    """
    bound = norm_bound(x)
    if bound <= mu:
        return Shrunk(torch.zeros_like(x), 0, 0.0, bound)
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
        return Shrunk(torch.zeros_like(x), 0, 0.0, bound)
    positive = (shifted + shifted @ sign).mul_(0.5)
    nuclear = float(positive.diagonal().double().sum()) * bound
    return Shrunk((positive @ polar).mul_(bound), rank, nuclear, bound)


def norm_bound(x: Tensor) -> float:
    """An upper bound of the largest singular value: ``||(X X^T)^8||_F^(1/16)``."""
    size = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    if size == 0.0:
        return 0.0
    scaled = x / size
    power = scaled @ scaled.T
    logarithm, exponent = 0.0, 2.0
    for _ in range(BOUND_SQUARINGS):
        length = float(torch.linalg.vector_norm(power, dtype=torch.float64))
        power = power / length
        logarithm += math.log(length) / exponent
        power, exponent = power @ power, 2.0 * exponent
    logarithm += math.log(float(torch.linalg.vector_norm(power, dtype=torch.float64))) / exponent
    return 1.0001 * size * math.exp(logarithm)


def spectral_norm(x: Tensor) -> float:
    """Largest singular value of ``(a, b)``, ``a <= b``, by repeated squaring of ``X X^T``."""
    size = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    if size == 0.0:
        return 0.0
    scaled = x / size
    power = scaled @ scaled.T
    for _ in range(SQUARINGS):
        power = power @ power
        power = power / power.diagonal().sum()
    # the columns are mixtures of the top left singular vectors; the largest one is sound
    column = power[:, int(power.diagonal().argmax())]
    column = column / torch.linalg.vector_norm(column)
    return size * float(torch.linalg.vector_norm(scaled.T @ column, dtype=torch.float64))


def _orthogonalised(y: Tensor, lower: float) -> Tensor:
    """Singular values in ``[lower, 1]`` to 1, smaller ones to something in ``[0, 1]``."""
    eps = torch.finfo(y.dtype).eps
    settling = 0
    while settling < 2:
        squared = 3.0 / (1.0 + lower + lower * lower)
        rho = math.sqrt(squared)
        gram = (y @ y.T).mul_(-0.5 * rho * squared)
        gram.diagonal().add_(1.5 * rho)
        y = gram @ y
        lower = min(0.5 * rho * lower * (3.0 - squared * lower * lower), 1.0)
        settling += 1.0 - lower < math.sqrt(eps)
    return y


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 keeps ten bits, too few to converge."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
