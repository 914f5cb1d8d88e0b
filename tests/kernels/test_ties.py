from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors

from mergekit_ext.kernels.selection import Keeper, cut_for
from mergekit_ext.kernels.ties import TiesOptions, merge_ties
from tests.reference.ties import merge as reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8}


def inputs(dtype, device, shape=(17, 13), count=3):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    tuned = [
        base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]
    return [t.to(device, dtype) for t in (base, *tuned)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        TiesOptions(),
        TiesOptions(normalize=False, factor=0.7),
        TiesOptions(rescale=True),
        TiesOptions(elect=False, normalize=False),
        TiesOptions(elect=False, factor=-2.0),
    ],
    ids=str,
)
def test_against_the_reference(dtype, options, device, chunk):
    base, *tuned = inputs(dtype, device)
    weights, densities = [0.5, 0.3, -0.1], [0.2, 0.73, 1.0]
    found = merge_ties(base, tuned, weights, densities, options)
    wanted = reference(
        base.cpu(),
        [t.cpu() for t in tuned],
        weights,
        densities,
        elect=options.elect,
        normalize=options.normalize,
        rescale=options.rescale,
        factor=options.factor,
    )
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("density", [1.0, 0.9, 0.1, 1e-9, 0.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_gives_what_mergekit_gives(density, normalize, device):
    base, *tuned = inputs(torch.float32, device)
    weights = [0.5, 0.3, 0.2]
    found = merge_ties(base, tuned, weights, [density] * 3, TiesOptions(normalize=normalize))
    wanted = merge_tensors(
        [base, *tuned],
        "ties",
        base_index=0,
        parameters={"weight": weights, "density": density, "normalize": normalize},
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (2, 3, 5)], ids=str)
def test_shapes(shape, device):
    base, *tuned = inputs(torch.float32, device, shape)
    found = merge_ties(base, tuned, [1.0] * 3, [0.5] * 3, TiesOptions())
    wanted = reference(base.cpu(), [t.cpu() for t in tuned], [1.0] * 3, [0.5] * 3)
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=2e-6, atol=2e-6)


def test_equal_magnitudes_are_kept_in_order_and_exactly_as_many_as_asked(device, chunk):
    base = torch.zeros(200, device=device)
    tuned = torch.ones(200, device=device)
    tuned[::2] = -1.0
    found = merge_ties(base, [tuned], [1.0], [0.35], TiesOptions())
    assert torch.equal(found[:70], tuned[:70])
    assert not found[70:].any()


values = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5e-45, -1.5e-45]),
    ),
    min_size=1,
    max_size=40,
)


@given(values, st.data(), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 7))
def test_the_cut_keeps_the_k_largest(numbers, data, dtype, size):
    keep = data.draw(st.integers(1, len(numbers)))
    x = torch.tensor(numbers, dtype=dtype)
    cut = cut_for(lambda: x.split(size), keep, dtype)
    keeper = Keeper(cut)
    kept = torch.cat([keeper.drop(piece.clone()) for piece in x.split(size)])
    order = sorted(range(len(numbers)), key=lambda i: (-abs(float(x[i])), i))
    wanted = torch.zeros_like(x)
    wanted[order[:keep]] = x[order[:keep]]
    assert torch.equal(kept, wanted)
