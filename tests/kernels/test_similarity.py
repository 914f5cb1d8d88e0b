from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels import numerics
from mergekit_ext.kernels.similarity import Gram, cosines
from tests.reference import grouping as reference

SHAPES = [(5, 7), (), (1,), (0, 3), (2, 3, 4), (101,)]


@pytest.fixture(params=[1 << 19, 40, 1], ids=["one chunk", "many chunks", "an entry a chunk"])
def buffer(request, monkeypatch):
    monkeypatch.setattr(numerics, "_CPU_CHUNK", request.param)
    monkeypatch.setattr(numerics, "_ACCELERATOR_CHUNK", request.param)


def models(count, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = [draw(shape).mul(scale).to(dtype) for shape in SHAPES]
    tuned = [[(b + scale * draw(b.shape)).to(dtype) for b in base] for _ in range(count)]
    return base, tuned


def gram_of(tuned, base=None):
    gram = Gram(len(tuned))
    for position in range(len(tuned[0])):
        gram.add([t[position] for t in tuned], None if base is None else base[position])
    return gram.value


def relative_error(found, wanted):
    norms = wanted.diagonal().sqrt()
    return float(((found - wanted) / (norms[:, None] * norms)).abs().max())


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-7), (torch.bfloat16, 1e-7), (torch.float16, 1e-7)],
    ids=str,
)
def test_against_float64(dtype, tolerance, with_base, device, buffer):
    base, tuned = models(4, dtype)
    on_device = [[t.to(device) for t in task] for task in tuned]
    origin = [b.to(device) for b in base] if with_base else None
    found = gram_of(on_device, origin)
    assert found.dtype == torch.float64 and found.device.type == "cpu"
    assert torch.equal(found, found.T)
    wanted = reference.gram(tuned, base if with_base else None)
    # Without a base nothing is rounded before the products.
    assert relative_error(found, wanted) < (tolerance if with_base else 1e-14)


@pytest.mark.parametrize("scale", [1e19, 1e-30, 1e-40])
def test_float32_products_that_leave_the_range_of_float32(scale, device):
    _, tuned = models(3, scale=scale)
    found = gram_of([[t.to(device) for t in task] for task in tuned])
    assert relative_error(found, reference.gram(tuned, None)) < 1e-14


def test_one_huge_model_among_tiny_ones(device):
    _, tuned = models(3)
    for model, scale in zip(tuned, (1e19, 1.0, 1e-30), strict=True):
        for tensor in model:
            tensor.mul_(scale)
    found = gram_of([[t.to(device) for t in task] for task in tuned])
    assert relative_error(found, reference.gram(tuned, None)) < 1e-14


def test_constant_vectors_do_not_drift(device):
    # Equal terms round the same way at each addition, which is the worst case of a float32 sum.
    values = torch.tensor([0.1, 0.3, 1.7], device=device)
    gram = Gram(3)
    gram.add([value.expand(200_000) for value in values])
    wanted = 200_000 * torch.outer(values.double(), values.double()).cpu()
    assert relative_error(gram.value, wanted) < 1e-11


def test_mixed_dtypes_are_not_subtracted_in_half_precision(device):
    base = torch.full((9,), 1.0, dtype=torch.bfloat16, device=device)
    tuned = torch.full((9,), 2.0**-12, dtype=torch.bfloat16, device=device)
    gram = Gram(1)
    gram.add([tuned], base)
    assert float(gram.value) == 9 * (1 - 2.0**-12) ** 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_base", [True, False])
def test_non_finite_inputs_show(bad, with_base, device):
    base, tuned = models(3)
    tuned[1][4][1, 2, 3] = bad
    found = gram_of(
        [[t.to(device) for t in task] for task in tuned],
        [b.to(device) for b in base] if with_base else None,
    )
    assert not torch.isfinite(found[1, 1])
    alike = cosines(found)
    assert alike[1].isnan().all() and alike[:, 1].isnan().all()
    assert torch.isfinite(alike[[0, 2]][:, [0, 2]]).all()


def test_an_overflowing_norm_is_not_similarity_zero():
    alike = cosines(torch.tensor([[torch.inf, 5.0], [5.0, 1.0]]))
    assert alike[0].isnan().all() and float(alike[1, 1]) == 1.0


def test_zero_vectors(device):
    zero, one = torch.zeros(4, device=device), torch.ones(4, device=device)
    gram = Gram(3)
    gram.add([zero, one, zero])
    assert cosines(gram.value).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_opposite_and_equal_vectors_are_exactly_so():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    gram = Gram(3)
    gram.add([x, x * 3, -x])
    assert cosines(gram.value).tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]


@given(st.integers(0, 2**32), st.lists(st.integers(-60, 30), min_size=3, max_size=5))
def test_scaling_vectors_changes_no_cosine(seed, exponents):
    _, tuned = models(len(exponents), seed=seed)
    before = cosines(gram_of(tuned))
    scaled = [[t * 2.0**e for t in task] for task, e in zip(tuned, exponents, strict=True)]
    after = cosines(gram_of(scaled))
    assert torch.equal(before, after)
    assert torch.equal(after, after.T)
    assert float(after.abs().max()) == 1.0
    wanted = reference.gram(tuned, None)
    norms = wanted.diagonal().sqrt()
    torch.testing.assert_close(before, wanted / (norms[:, None] * norms), rtol=0, atol=1e-10)
