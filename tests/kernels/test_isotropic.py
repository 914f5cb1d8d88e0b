from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels.isotropic import common_and_specific, isotropic
from tests.kernels.test_tsv import TOLERANCE, close, decaying, low_rank, models
from tests.reference.isotropic import iso_c, iso_cts

PAIRS = {"iso_c": (isotropic, iso_c), "iso_cts": (common_and_specific, iso_cts)}
BOTH = pytest.mark.parametrize("name", PAIRS)


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (40, 8), (1, 6), (1, 1), (5,)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_against_the_reference(name, dtype, shape, count, device):
    function, reference = PAIRS[name]
    deltas = models(shape, count, dtype, device)
    found = function(deltas)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.shape == shape
    close(found, reference([d.cpu() for d in deltas]), 10 * TOLERANCE[dtype])


@BOTH
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(name, scale):
    function, reference = PAIRS[name]
    deltas = [d * scale for d in models()]
    close(function(deltas), reference(deltas), 1e-5)


@BOTH
@pytest.mark.parametrize("lowest", [1e-1, 1e-3])
def test_spectra_that_decay(name, lowest):
    function, reference = PAIRS[name]
    deltas = decaying(lowest, dtype=torch.float64)
    close(function(deltas), reference(deltas), 1e-9)
    close(function([d.float() for d in deltas]), reference(deltas), 1e-3 / lowest * 1e-4)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8, 1.0])
def test_fractions(fraction):
    deltas = models(dtype=torch.float64)
    close(common_and_specific(deltas, fraction), iso_cts(deltas, fraction), 1e-10)


def test_all_directions_in_common_is_iso_c():
    deltas = models(dtype=torch.float64)
    close(common_and_specific(deltas, 1.0), isotropic(deltas), 1e-10)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank_changes_bring_no_arbitrary_directions(name, dtype):
    function, reference = PAIRS[name]
    deltas = [low_rank(seed).to(dtype) for seed in range(3)]
    found = function(deltas)
    close(found, reference(deltas), 1e-3 if dtype == torch.float32 else 1e-9)
    spanned = torch.linalg.svd(torch.cat(deltas, 1).double(), full_matrices=False).U[:, :6]
    outside = found.double() - spanned @ (spanned.T @ found.double())
    assert outside.norm() < 1e-4 * found.norm()


@BOTH
def test_zeros_and_changes_that_cancel(name):
    function, _ = PAIRS[name]
    zero, (delta,) = torch.zeros(4, 3), models((4, 3), 1)
    assert not function([zero, zero]).any()
    assert not function([delta, -delta]).any()


@BOTH
def test_one_task_returns_itself(name):
    (delta,) = models(count=1)
    assert torch.equal(PAIRS[name][0]([delta]), delta)


@BOTH
def test_layouts(name):
    function, reference = PAIRS[name]
    deltas = models((2, 6, 5), dtype=torch.float64)
    stacked = function(deltas, layout="stacked")
    for slot in range(2):
        close(stacked[slot], reference([d[slot] for d in deltas]), 1e-10)
    flat = function(deltas, layout="flattened").reshape(2, 30)
    close(flat, reference([d.reshape(2, 30) for d in deltas]), 1e-10)


@given(st.integers(0, 50), st.integers(1, 4), st.integers(2, 7), st.integers(2, 7))
def test_one_singular_value_whatever_the_order(seed, count, rows, columns):
    deltas = models((rows, columns), count + 1, torch.float64, seed=seed)
    found = isotropic(deltas)
    sigma = torch.linalg.svdvals(found)
    torch.testing.assert_close(sigma, sigma.mean().expand_as(sigma), rtol=1e-6, atol=0.0)
    assert float(sigma[0]) == pytest.approx(float(torch.linalg.svdvals(sum(deltas)).mean()))
    allowed = 1e-6 * (1.0 + found.abs().max())
    for other in (isotropic([d.T for d in deltas]).T, isotropic(deltas[::-1])):
        assert torch.all((found - other).abs() <= allowed)
    for function in (isotropic, common_and_specific):
        merged = function(deltas)
        for other in (function([4.0 * d for d in deltas]) / 4.0, -function([-d for d in deltas])):
            assert torch.all((merged - other).abs() <= allowed)
