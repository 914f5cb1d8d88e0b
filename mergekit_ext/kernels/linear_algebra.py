"""Products, sums and decompositions that give the same bytes with any number of threads.

A BLAS or LAPACK library, and torch where it sums to one number, split their work by the number of
threads, and with it the order of sums and what is left for the ends of vectors. Here work is split
by its shape alone, and each piece is done by one thread (`threads.in_threads`). What cannot be
split without giving its speed away, the decompositions of small matrices, is done by one thread.
Elementwise operations and sums to more than one number are torch's: these it does alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_ext.kernels.threads import in_threads, one_thread

# Multiplications below which threads cost more than they save.
_SMALL_PRODUCT = 1 << 23
# The longer side of a product is cut into pieces: four, or more of `_PIECE`, or eight. Measured:
# one thread loses 1 to 3% to them.
_UNIT, _PIECE = 64, 256
# torch sums so few numbers by one thread.
_SUMMED = 1 << 12
# Below this (side times squared count) one thread does a QR factorisation; from it on, so many
# reflections are made by one thread before several apply them to the columns that are left.
_SMALL_QR, _REFLECTIONS = 1 << 26, 128


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices."""
    if left.device.type != "cpu":
        return left @ right
    rows, columns = left.shape[0], right.shape[1]
    if rows * columns * left.shape[1] < _SMALL_PRODUCT:
        with one_thread():
            return left @ right
    out = left.new_empty((rows, columns))

    def some_rows(part: slice) -> None:
        torch.mm(left[part], right, out=out[part])

    def some_columns(part: slice) -> None:
        torch.mm(left, right[:, part], out=out[:, part])

    in_threads(
        some_rows if rows >= columns else some_columns, _pieces(max(rows, columns)), left.device
    )
    return out


def gram(rows: Tensor) -> Tensor:
    """The lower triangle of ``rows @ rows.T``, which is all that `eigh` and `cholesky` read.

    What is above the diagonal is not to be used.
    """
    side, length = rows.shape
    if rows.device.type != "cpu" or side * side * length < _SMALL_PRODUCT:
        return matmul(rows, rows.T)
    out = rows.new_zeros((side, side))

    def some_rows(part: slice) -> None:
        torch.mm(rows[part], rows[: part.stop].T, out=out[part, : part.stop])

    # The longest first, so that no thread is left with it at the end.
    in_threads(some_rows, _pieces(side)[::-1], rows.device)
    return out


def _pieces(length: int) -> list[slice]:
    quarter, eighth = (-(-length // (count * _UNIT)) * _UNIT for count in (4, 8))
    step = max(min(quarter, _PIECE), eighth, 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def total(x: Tensor) -> float:
    """The sum of all entries: of pieces in the dtype of the data, together in float64."""
    flat = x.reshape(-1)
    whole = flat.numel() // _SUMMED * _SUMMED
    rest = float(flat[whole:].sum(dtype=torch.float64))
    return rest + total(flat[:whole].view(-1, _SUMMED).sum(dim=-1).double()) if whole else rest


def inner(x: Tensor, y: Tensor) -> float:
    """Frobenius inner product: of pieces in the dtype of the data, together in float64."""
    return total(x * y)


def norm(x: Tensor) -> float:
    """Frobenius norm: of pieces in the dtype of the data, together in float64."""
    flat = x.reshape(-1)
    whole = flat.numel() // _SUMMED * _SUMMED
    pieces = torch.linalg.vector_norm(flat[:whole].view(-1, _SUMMED), dim=-1).double()
    rest = float(torch.linalg.vector_norm(flat[whole:], dtype=torch.float64))
    return math.hypot(math.sqrt(total(pieces.square_())), rest)


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`: values in ascending order, and vectors. Reads the lower triangle."""
    with one_thread():
        values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd`, thin: U, sigma in descending order, and V^T."""
    with one_thread():
        u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u, sigma, vh


def cholesky(symmetric: Tensor, upper: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex`: the factor, and what is not 0 where there is none."""
    with one_thread():
        factor, info = torch.linalg.cholesky_ex(symmetric, upper=upper)
    return factor, info


def solve_triangular(triangle: Tensor, right: Tensor, *, upper: bool, left: bool = True) -> Tensor:
    """`torch.linalg.solve_triangular`."""
    with one_thread():
        return torch.linalg.solve_triangular(triangle, right, upper=upper, left=left)


def qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.qr` of a matrix: Q with orthonormal columns, and R."""
    side, count = columns.shape
    if columns.device.type != "cpu" or side < count or side * count**2 < _SMALL_QR:
        with one_thread():
            q, r = torch.linalg.qr(columns)
        return q, r
    rest = columns.mT.contiguous().mT  # by columns, as LAPACK wants them
    if rest.data_ptr() == columns.data_ptr():
        rest = rest.clone()
    parts = [slice(at, min(at + _REFLECTIONS, count)) for at in range(0, count, _REFLECTIONS)]
    factors = rest.new_empty(count)
    for part in parts:
        with one_thread():
            rest[part.start :, part], factors[part] = torch.geqrf(rest[part.start :, part])
            vectors, middle = _compact(rest[part.start :, part], factors[part])
        _reflect(rest[part.start :, part.stop :], vectors, middle.T)
    q = torch.zeros_like(rest)
    q.diagonal().fill_(1.0)
    for part in reversed(parts):
        with one_thread():
            vectors, middle = _compact(rest[part.start :, part], factors[part])
        _reflect(q[part.start :, part.start :], vectors, middle)
    return q, rest[:count].triu()


def _compact(stored: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """V and T of the product ``I - V T V^T`` of reflections as LAPACK stores them.

    Schreiber and Van Loan 1989, "A Storage-Efficient WY Representation for Products of Householder
    Transformations"; T from its inverse, ``diag(1 / factors)`` with V^T V above it.
    """
    vectors = stored.tril(-1)
    vectors.diagonal().fill_(1.0)
    idle = factors == 0  # of a column that was zero
    vectors[:, idle] = 0.0
    inverse = (vectors.T @ vectors).triu(1)
    inverse.diagonal().copy_(1.0 / factors.masked_fill(idle, 1.0))
    unit = torch.eye(len(factors), dtype=stored.dtype)
    return vectors, torch.linalg.solve_triangular(inverse, unit, upper=True)


def _reflect(columns: Tensor, vectors: Tensor, middle: Tensor) -> None:
    """Multiply by ``I - V T V^T`` from the left, in place."""

    def some(part: slice) -> None:
        columns[:, part].addmm_(vectors, middle @ (vectors.T @ columns[:, part]), alpha=-1.0)

    in_threads(some, _pieces(columns.shape[1]), columns.device)
