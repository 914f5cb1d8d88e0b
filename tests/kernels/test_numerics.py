from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels.numerics import count_non_finite, squared_norms, weighted_sum

TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def tensors(dtype, device, shape=(37, 11), count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


@dtypes
@pytest.mark.parametrize("shape", [(37, 11), (5,), (), (0, 3), (2, 3, 4)], ids=str)
def test_weighted_sum_over_a_base(dtype, shape, device, chunk):
    base, *models = tensors(dtype, device, shape)
    squares: list[float] = []
    found = weighted_sum(models, [0.3, -0.2, 0.9], base=base, squares=squares)
    change = sum(
        c * (m.double() - base.double()) for c, m in zip((0.3, -0.2, 0.9), models, strict=True)
    )
    wanted = base.double() + change
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert sum(squares) == pytest.approx(float(change.square().sum()), rel=1e-6)


@dtypes
def test_weighted_sum(dtype, device, chunk):
    models = tensors(dtype, device)
    found = weighted_sum(models, [0.4, 0.3, 0.2, 0.1], out_dtype=torch.float64)
    wanted = sum(c * m.double() for c, m in zip((0.4, 0.3, 0.2, 0.1), models, strict=True))
    assert found.dtype == torch.float64
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@dtypes
def test_a_model_equal_to_the_base_adds_exactly_nothing(dtype, device):
    base, *_ = tensors(dtype, device)
    assert torch.equal(weighted_sum([base.clone()], [123.0], base=base), base)


def test_strided_inputs_are_read_as_they_are(device, chunk):
    base, model = (t.t() for t in tensors(torch.float32, device, count=2))
    torch.testing.assert_close(weighted_sum([model], [1.0], base=base), model)
    assert squared_norms([model], base)[0] == pytest.approx(
        float((model.double() - base.double()).square().sum()), rel=1e-6
    )


@dtypes
def test_squared_norm(dtype, device, chunk):
    base, model, *_ = tensors(dtype, device)
    wanted = float(model.double().square().sum())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert squared_norms([model])[0] == pytest.approx(wanted, rel=tolerance)
    wanted = float((model.double() - base.double()).square().sum())
    assert squared_norms([model], base)[0] == pytest.approx(wanted, rel=1e-6)


def test_rounding_does_not_add_up(device):
    # Equal entries round the same way each time: the worst case for a running sum.
    x = torch.full((1 << 20,), 0.1, device=device)
    assert squared_norms([x])[0] == pytest.approx(float(x[0].double() ** 2) * x.numel(), rel=1e-6)


@given(st.floats(-37, 37))
def test_squared_norm_keeps_its_range(exponent):
    scale = 10.0**exponent
    x = torch.tensor([3 * scale, 4 * scale], dtype=torch.float32)
    assert math.sqrt(squared_norms([x])[0]) == pytest.approx(5 * scale, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_inputs_show(bad, device):
    x = torch.zeros(5, device=device)
    x[3] = bad
    assert not math.isfinite(squared_norms([x])[0])
    assert not math.isfinite(squared_norms([torch.zeros_like(x)], x)[0])
    assert count_non_finite(x) == 1
