"""Products, sums and decompositions that do not depend on the number of threads."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ext.kernels.linear_algebra import (
    add_products,
    cholesky,
    eigh,
    gram,
    matmul,
    norm,
    power_of_two,
    qr,
    solve_triangular,
    svd,
    total,
)
from tests.kernels.threads import with_any_number_of_threads

FLOATS = (torch.float32, torch.float64)
# On either side of what is cut into pieces, with sides that are no multiple of anything.
PRODUCTS = ((3, 5, 7), (0, 4, 5), (6, 0, 5), (33, 1000, 33), (257, 300, 401), (1025, 301, 67))
# Of columns: one thread's, several threads', and with fewer rows than columns.
COLUMNS = ((5, 3), (300, 100), (1100, 333), (90, 130))


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def close(found, expected, dtype):
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    return found.shape == expected.shape and error <= 400 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", PRODUCTS)
def test_products(shape, dtype):
    rows, middle, columns = shape
    left, right = normal(rows, middle, dtype=dtype), normal(middle, columns, dtype=dtype)
    for one in (left, left.T.contiguous().T):
        for other in (right, right.T.contiguous().T):
            found = with_any_number_of_threads(lambda one=one, other=other: matmul(one, other))
            assert close(found, left @ right, dtype)


@pytest.mark.parametrize("shape", ((1, 64, 256, 33), (3, 33, 128, 257), (2, 700, 8, 501)))
def test_added_products(shape):
    n, rows, middle, columns = shape
    stack, right = normal(n, rows, columns), normal(n, middle, columns)
    left = normal(n, middle, rows).mT
    found = with_any_number_of_threads(lambda: add_products(stack, left, right, 0.3))
    assert close(found, stack + 0.3 * left @ right, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ((4, 9), (130, 70), (301, 400), (67, 3001)))
def test_gram_matrices(shape, dtype):
    rows = normal(*shape, dtype=dtype)
    found = with_any_number_of_threads(lambda: gram(rows))
    assert close(found.tril(), (rows @ rows.T).tril(), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ((), (0,), (5,), (4096,), (100_003,), (1, 70_000), (251, 333)))
def test_sums_and_norms(shape, dtype):
    x, y = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype) + 1
    found = with_any_number_of_threads(lambda: (total(x), total(x * y), norm(x)))
    wide, other = x.double().flatten().tolist(), y.double().flatten().tolist()
    size = math.sqrt(math.fsum(v * v for v in wide))
    expected = (math.fsum(wide), math.fsum(v * w for v, w in zip(wide, other, strict=True)), size)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5 * size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", COLUMNS)
def test_orthonormal_columns(shape, dtype):
    columns = normal(*shape, dtype=dtype)
    kept = columns.clone()
    q, r = with_any_number_of_threads(lambda: qr(columns))
    assert torch.equal(columns, kept)
    assert torch.equal(r, r.triu())
    assert close(q @ r, columns, dtype)
    assert close(q.T @ q, torch.eye(min(shape), dtype=dtype), dtype)


@pytest.mark.parametrize("columns", ("zeros", "duplicates", "transposed"))
def test_orthonormal_columns_of_any_rank(columns):
    x = normal(333, 1100).T
    if columns == "zeros":
        x[:, 100:300] = 0.0
    elif columns == "duplicates":
        x[:, 150:300] = x[:, :150]
    q, r = qr(x)
    assert close(q @ r, x, torch.float64)
    assert close(q.T @ q, torch.eye(333, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("side", (7, 130, 260))
def test_decompositions(side, dtype):
    x = normal(side, side + 40, dtype=dtype)
    square = x @ x.T + side * torch.eye(side, dtype=dtype)
    for work in (
        lambda: eigh(square),
        lambda: svd(x),
        lambda: cholesky(square),
        lambda: cholesky(square, upper=True),
        lambda: solve_triangular(square.triu(), x, upper=True),
        lambda: solve_triangular(square.triu(), x.T, upper=True, left=False),
    ):
        with_any_number_of_threads(work)
    values, vectors = eigh(square.tril())
    assert close((vectors * values) @ vectors.T / side, square / side, dtype)
    u, sigma, vh = svd(x)
    assert close((u * sigma) @ vh, x, dtype)
    factor, failed = cholesky(square)
    assert int(failed) == 0
    assert close(factor @ factor.T / side, square / side, dtype)


def test_a_power_of_two_near_the_largest_magnitude():
    assert power_of_two(torch.tensor([[3.0, -5.0]])) == 4.0
    assert power_of_two(torch.zeros(2, 2)) == power_of_two(torch.zeros(0, 2)) == 1.0
