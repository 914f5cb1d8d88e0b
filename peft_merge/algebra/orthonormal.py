r"""Orthonormal bases of the span of a few long columns, without forming them.

:math:`X = QR` with X (side, R) and R much below side. What merging needs is R (coordinates) and
products :math:`Qx` with few columns, so Q is never formed: :math:`Qx = X R^{-1} x`, or a product
of Householder reflections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Q from a Gram matrix is orthonormal up to eps * ||R^-1||^2 (columns of norm 1): to about 1e-11
# here. Beyond that Householder reflections, which are orthonormal whatever X is.
LARGEST_INVERSE = 100.0


class Basis(Protocol):
    """An orthonormal basis Q (n, side, p) of the columns of X (n, side, R), p = min(side, R).

    Attributes:
        coordinates: ``Q^T X``, (n, p, R).
    """

    @property
    def coordinates(self) -> Tensor: ...

    def expand(self, x: Tensor) -> Tensor:
        """Return ``Q x`` of an (n, p, k) tensor: (n, side, k)."""
        ...


def orthonormal(columns: Tensor) -> Basis:
    """Return a basis of the columns of a float64 (n, side, R) tensor.

    The cheapest that is exact: X itself where it has no more rows than columns; Cholesky QR
    (one product with the transpose; columns scaled to norm 1 first, so that adapters of very
    different sizes do no harm) where the condition allows; Householder QR otherwise, as for
    duplicate adapters and zero factors.
    """
    if columns.shape[-1] >= columns.shape[-2]:
        return Identity(columns)
    return _cholesky(columns) or Reflections.of(columns)


@dataclass(frozen=True)
class Identity:
    """The unit vectors: of all space."""

    coordinates: Tensor

    def expand(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Cholesky:
    """``Q = X D^-1 R^-1`` with ``R^T R = D^-1 X^T X D^-1`` and D the norms of the columns."""

    columns: Tensor
    norms: Tensor
    triangle: Tensor

    @property
    def coordinates(self) -> Tensor:
        return self.triangle * self.norms

    def expand(self, x: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(self.triangle, x, upper=True)
        return self.columns @ (inner / self.norms.mT)


def _cholesky(columns: Tensor) -> Cholesky | None:
    """None where it would not be orthonormal."""
    gram = columns.mT @ columns
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]
    if not bool((norms > 0).all()):
        return None
    gram = gram / norms.mT / norms
    triangle, info = torch.linalg.cholesky_ex(gram, upper=True)
    if bool(info.any()):
        return None
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(triangle, unit, upper=True)
    if float(torch.linalg.matrix_norm(inverse).max()) <= LARGEST_INVERSE:
        return Cholesky(columns, norms, triangle)
    return None  # also where squares have left the range


@dataclass(frozen=True)
class Reflections:
    """Householder reflections, as LAPACK stores them."""

    stored: Tensor
    factors: Tensor

    @classmethod
    def of(cls, columns: Tensor) -> Reflections:
        stored, factors = torch.geqrf(columns)
        return cls(stored, factors)

    @property
    def coordinates(self) -> Tensor:
        return self.stored[..., : self.stored.shape[-1], :].triu()

    def expand(self, x: Tensor) -> Tensor:
        padding = x.new_zeros(*x.shape[:-2], self.stored.shape[-2] - x.shape[-2], x.shape[-1])
        return torch.ormqr(self.stored, self.factors, torch.cat([x, padding], dim=-2))
