from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels import numerics
from mergekit_ext.kernels.consensus import mask
from tests.reference.consensus import mask as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 1.0, 3.0])
def test_against_the_reference(dtype, threshold, device, monkeypatch):
    monkeypatch.setattr(numerics, "_CPU_CHUNK", 50)
    generator = torch.Generator().manual_seed(1)
    delta, unified = (torch.randn(11, 17, generator=generator).to(device, dtype) for _ in "du")
    found = mask(delta, unified, threshold)
    assert found.dtype == torch.bool and found.shape == delta.shape
    assert torch.equal(found.cpu(), reference(delta.cpu(), unified.cpu(), threshold))
    assert threshold == 0.0 or 0 < int(found.sum()) < found.numel()


numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, 1.5e-45]),
)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_extremes_at_a_threshold_without_rounding(pairs):
    delta, unified = (torch.tensor(x, dtype=torch.float32) for x in zip(*pairs, strict=True))
    # Only differences of numbers far apart round in float64, and those are no near thing.
    assert torch.equal(mask(delta, unified, 0.5), reference(delta, unified, 0.5))


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_a_larger_threshold_keeps_less(pairs):
    delta, unified = (torch.tensor(x, dtype=torch.float32) for x in zip(*pairs, strict=True))
    assert torch.all(mask(delta, unified, 0.4) >= mask(delta, unified, 0.9))


def test_equality_is_kept_as_in_the_paper():
    one = torch.tensor([1.0, 1.0, 0.0])
    assert mask(one, torch.tensor([2.0, 2.1, 0.0]), 1.0).tolist() == [True, False, True]


def test_a_task_equal_to_the_merged_vector_is_kept():
    delta = torch.tensor([0.0, 1e-30, -3e38])
    assert mask(delta, delta).all()


def test_nan_is_not_kept():
    assert not mask(torch.tensor([torch.nan]), torch.ones(1)).any()


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_bad_thresholds(threshold):
    with pytest.raises(ValueError, match="threshold: found"):
        mask(torch.ones(1), torch.ones(1), threshold)
