"""Products, sums and decompositions that give the same bytes with any number of threads.

A BLAS or LAPACK library, and torch where it sums to one number, split their work by the number of
threads, and with it the order of sums and what is left for the ends of vectors. Here work is split
by its shape alone, and each piece is done by one thread (`threads.in_threads`). What cannot be
split without giving its speed away, the decompositions of small matrices, is done by one thread.
Elementwise operations and sums to more than one number are torch's: these it does alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.threads import by_one_thread, in_threads

# Multiplications below which threads cost more than they save, and those that two are enough for.
_SMALL_PRODUCT, _MIDDLING_PRODUCT = 1 << 24, 1 << 26
# The longer side of a product is cut into pieces: two, or from `_MIDDLING_PRODUCT` on four, or more
# of at most `_PIECE`, or eight. Measured: one thread loses 1 to 3% to them.
_UNIT, _PIECE = 64, 256
# torch sums so few numbers by one thread.
_SUMMED = 1 << 12
# Below this (side times squared count) one thread does a QR factorisation; from it on, so many
# reflections are made by one thread before several apply them to the columns that are left.
_SMALL_QR, _REFLECTIONS = 1 << 26, 128


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices."""
    columns = right.shape[1]
    work = left.numel() * columns
    if work < _SMALL_PRODUCT or not left.is_cpu:
        return _product(left, right)
    rows = len(left)
    out = left.new_empty((rows, columns))

    def some_rows(part: slice) -> None:
        torch.mm(left[part], right, out=out[part])

    def some_columns(part: slice) -> None:
        torch.mm(left, right[:, part], out=out[:, part])

    pieces = _pieces(max(rows, columns), work)
    in_threads(some_rows if rows >= columns else some_columns, pieces, left.device)
    return out


@by_one_thread
def _product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def add_products(stack: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``stack + scale left @ right`` of (n, rows, columns), (n, rows, k) and (n, k, columns)."""
    if not stack.is_cpu:
        return torch.baddbmm(stack, left, right, alpha=scale)
    out = torch.empty_like(stack, memory_format=torch.contiguous_format)

    def some(piece: tuple[int, slice]) -> None:
        at, part = piece
        torch.addmm(stack[at, part], left[at, part], right[at], alpha=scale, out=out[at, part])

    parts = _pieces(stack.shape[1], left[0].numel() * stack.shape[2]) if len(stack) else []
    in_threads(some, [(at, part) for at in range(len(stack)) for part in parts], stack.device)
    return out


def gram(rows: Tensor) -> Tensor:
    """The lower triangle of ``rows @ rows.T``, which is all that `eigh` and `cholesky` read.

    What is above the diagonal is not to be used.
    """
    side, length = rows.shape
    work = side * side * length
    if work < _SMALL_PRODUCT or not rows.is_cpu:
        return _product(rows, rows.T)
    out = rows.new_zeros((side, side))

    def some_rows(part: slice) -> None:
        torch.mm(rows[part], rows[: part.stop].T, out=out[part, : part.stop])

    # The longest first, so that no thread is left with it at the end.
    in_threads(some_rows, _pieces(side, work)[::-1], rows.device)
    return out


def _pieces(length: int, work: int) -> list[slice]:
    fewest = 2 if work < _MIDDLING_PRODUCT else 4
    share, eighth = (-(-length // (count * _UNIT)) * _UNIT for count in (fewest, 8))
    step = max(min(share, _PIECE), eighth, 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def total(x: Tensor) -> float:
    """The sum of all entries: of rows in the dtype of the data, together in float64."""
    if x.numel() <= _SUMMED:
        return float(x.sum(dtype=torch.float64))
    rows, rest = _rows(x)
    return total(rows.sum(dim=-1).double()) + (0.0 if rest is None else float(rest.sum()))


def inner(x: Tensor, y: Tensor) -> float:
    """Frobenius inner product: of rows in the dtype of the data, together in float64."""
    return total(x * y)


def norm(x: Tensor) -> float:
    """Frobenius norm: of rows in the dtype of the data, together in float64."""
    rows, rest = _rows(x)
    norms = torch.linalg.vector_norm(rows, dim=-1).tolist()
    return math.hypot(*norms, 0.0 if rest is None else float(torch.linalg.vector_norm(rest)))


def _rows(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of a matrix; of anything else some of one length, and what is left."""
    if x.ndim == 2 and len(x) > 1:
        return x, None
    flat = x.reshape(-1)
    whole = flat.numel() // _SUMMED * _SUMMED
    return flat[:whole].view(-1, _SUMMED), flat[whole:]


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_i w_i delta_i``, in the dtype of the deltas."""
    tau = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        tau.add_(delta, alpha=weight)
    return tau


@by_one_thread
def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`: values in ascending order, and vectors. Reads the lower triangle."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors


@by_one_thread
def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd`, thin: U, sigma in descending order, and V^T."""
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u, sigma, vh


@by_one_thread
def cholesky(symmetric: Tensor, upper: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex`: the factor, and what is not 0 where there is none."""
    factor, info = torch.linalg.cholesky_ex(symmetric, upper=upper)
    return factor, info


@by_one_thread
def solve_triangular(triangle: Tensor, right: Tensor, *, upper: bool, left: bool = True) -> Tensor:
    """`torch.linalg.solve_triangular`."""
    return torch.linalg.solve_triangular(triangle, right, upper=upper, left=left)


def qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.qr` of a matrix: Q with orthonormal columns, and R."""
    side, count = columns.shape
    if not columns.is_cpu or side < count or side * count**2 < _SMALL_QR:
        return _qr(columns)
    rest = columns.mT.contiguous().mT  # by columns, as LAPACK wants them
    if rest.data_ptr() == columns.data_ptr():
        rest = rest.clone()
    parts = [slice(at, min(at + _REFLECTIONS, count)) for at in range(0, count, _REFLECTIONS)]
    factors = rest.new_empty(count)
    for part in parts:
        rest[part.start :, part], factors[part] = _reflections(rest[part.start :, part])
        vectors, middle = _compact(rest[part.start :, part], factors[part])
        _reflect(rest[part.start :, part.stop :], vectors, middle.T)
    q = torch.zeros_like(rest)
    q.diagonal().fill_(1.0)
    for part in reversed(parts):
        vectors, middle = _compact(rest[part.start :, part], factors[part])
        _reflect(q[part.start :, part.start :], vectors, middle)
    return q, rest[:count].triu()


@by_one_thread
def _qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(columns)
    return q, r


@by_one_thread
def _reflections(columns: Tensor) -> tuple[Tensor, Tensor]:
    """As LAPACK stores them, and their factors."""
    stored, factors = torch.geqrf(columns)
    return stored, factors


@by_one_thread
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

    in_threads(some, _pieces(columns.shape[1], columns.numel() * len(middle)), columns.device)
