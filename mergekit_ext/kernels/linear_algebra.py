"""Products, sums and decompositions that give the same bytes with any number of threads.

A BLAS or LAPACK library, and torch where it sums to one number, split their work by the number of
threads, and with it the order of sums. Here work is split by its shape alone, and each piece, as
well as the decomposition of a small matrix, is done by one thread (`threads.in_threads`).
Elementwise operations and sums to more than one number are torch's: these it does alike.
"""

import math
from collections.abc import Callable
from functools import partial

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

_Pair = tuple[Tensor, Tensor]
# torch's own, by one thread. `eigh` and `cholesky` read the lower triangle.
_product = by_one_thread(torch.matmul)
_qr: Callable[[Tensor], _Pair] = by_one_thread(torch.linalg.qr)
# Values in ascending order, and vectors.
eigh: Callable[[Tensor], _Pair] = by_one_thread(torch.linalg.eigh)
# U, sigma in descending order, and V^T.
svd: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = by_one_thread(
    partial(torch.linalg.svd, full_matrices=False)
)
# The factor, and what is not 0 where there is none.
cholesky: Callable[..., _Pair] = by_one_thread(torch.linalg.cholesky_ex)
solve_triangular: Callable[..., Tensor] = by_one_thread(torch.linalg.solve_triangular)
# Householder reflections as LAPACK stores them, and their factors.
_reflections: Callable[[Tensor], _Pair] = by_one_thread(torch.geqrf)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of two matrices."""
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


def add_products(stack: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ``stack + scale left @ right``: (n, rows, columns), (n, rows, k), (n, k, columns)."""
    if not stack.is_cpu:
        return torch.baddbmm(stack, left, right, alpha=scale)
    out = torch.empty_like(stack, memory_format=torch.contiguous_format)

    def some(piece: tuple[int, slice]) -> None:
        at, part = piece
        torch.addmm(stack[at, part], left[at, part], right[at], alpha=scale, out=out[at, part])

    parts = _pieces(stack.shape[1], left[0].numel() * stack.shape[2]) if len(stack) else []
    in_threads(some, [(at, part) for at in range(len(stack)) for part in parts], stack.device)
    return out


def gram(rows: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return the lower triangle of ``rows @ rows.T``, added `onto` a matrix; ignore the upper."""
    side, length = rows.shape
    work = side * side * length
    if work < _SMALL_PRODUCT or not rows.is_cpu:
        return _product(rows, rows.T) if onto is None else onto.add_(_product(rows, rows.T))
    out = rows.new_zeros((side, side)) if onto is None else onto

    def some_rows(part: slice) -> None:
        out[part, : part.stop].addmm_(rows[part], rows[: part.stop].T)

    # The longest first, so that no thread is left with it at the end.
    in_threads(some_rows, _pieces(side, work)[::-1], rows.device)
    return out


def _pieces(length: int, work: int) -> list[slice]:
    fewest = 2 if work < _MIDDLING_PRODUCT else 4
    share, eighth = (-(-length // (count * _UNIT)) * _UNIT for count in (fewest, 8))
    step = max(min(share, _PIECE), eighth, 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def matrices_of(tensor: Tensor, layout: str) -> Tensor:
    """Return a tensor of two axes or more as (n, rows, columns).

    One matrix if `layout` is "flattened" (convolutions), else each of the last two axes (experts).
    """
    if layout == "flattened":
        return tensor.reshape(1, tensor.shape[0], math.prod(tensor.shape[1:]))
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def total(x: Tensor) -> float:
    """Return the sum of all entries: of rows in the dtype of the data, together in float64."""
    if x.numel() <= _SUMMED:
        return float(x.sum(dtype=torch.float64))
    rows, rest = _rows(x)
    return total(rows.sum(dim=-1).double()) + (0.0 if rest is None else float(rest.sum()))


def norm(x: Tensor) -> float:
    """Return the Frobenius norm: of rows in the dtype of the data, together in float64."""
    rows, rest = _rows(x)
    norms = torch.linalg.vector_norm(rows, dim=-1).tolist()
    return math.hypot(*norms, 0.0 if rest is None else float(torch.linalg.vector_norm(rest)))


def power_of_two(x: Tensor) -> float:
    """Return a power of two within a factor 2 of the largest magnitude (1 for zeros)."""
    if not x.numel():
        return 1.0
    low, high = x.aminmax()
    peak = max(float(high), -float(low))
    return 2.0 ** math.floor(math.log2(peak)) if peak > 0.0 else 1.0


def _rows(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the rows of a matrix; of anything else some of one length, and what is left."""
    if x.ndim == 2 and len(x) > 1:
        return x, None
    flat = x.reshape(-1)
    whole = flat.numel() // _SUMMED * _SUMMED
    return flat[:whole].view(-1, _SUMMED), flat[whole:]


def qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return `torch.linalg.qr` of a matrix: Q with orthonormal columns, and R."""
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
