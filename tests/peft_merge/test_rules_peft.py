"""PEFT's own TIES variants, against the functions of PEFT that define them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, ties

from mergekit_ext.declared import Call
from peft_merge.modules import rules


def merged(name, tensors, weights, density, method="total"):
    each = [{"density": density}] * len(tensors)
    generators = [torch.Generator().manual_seed(i) for i in range(len(tensors))]
    given_ = Call(weights, {"majority_sign_method": method}, each)
    return rules()[name].merge(tensors, replace(given_, generators=generators)).tensor


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    weights=st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    density=st.sampled_from([0.2, 0.5, 0.9]),
    method=st.sampled_from(["total", "frequency"]),
)
def test_ties_is_that_of_peft(seed, weights, density, method):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(4, 5, generator=generator, dtype=torch.float64) * 10**i
        for i in range(len(weights))
    ]
    before = [tensor.clone() for tensor in tensors]
    expected = ties(tensors, torch.tensor(weights, dtype=torch.float64), density, method)
    ours = merged("peft_ties", tensors, weights, density, method)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_opposite_and_absent_changes(method):
    tensors = [torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([-1.0, 1.0, 0.0, 0.0])]
    tensors = [tensor.double() for tensor in tensors]
    expected = disjoint_merge(
        torch.stack(tensors), calculate_majority_sign_mask(torch.stack(tensors), method)
    )
    for name in ("peft_ties", "peft_dare_ties"):
        assert torch.equal(merged(name, tensors, [1.0, 1.0], 1.0, method), expected)
    assert expected.tolist() == [1.0, 1.0, 0.0, 2.0]


def test_dare_keeps_what_it_keeps_in_proportion():
    tensor = torch.full((4000,), 3.0, dtype=torch.float64)
    ours = merged("peft_dare_ties", [tensor], [0.5], 0.25)
    assert set(ours.tolist()) == {0.0, 6.0}
    assert 0.2 < (ours != 0).double().mean() < 0.3
