from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels import selection as module
from mergekit_ext.kernels.selection import order_statistic

numbers = st.lists(
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=True),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324]),
        # the same leading bits, so that every digit has to be looked at
        st.integers(0, 5).map(lambda i: 1.0 + i * 2.0**-52),
    ),
    min_size=1,
    max_size=40,
)


@given(numbers, st.data(), st.integers(1, 7), st.sampled_from([0, 1, 3, 1000]))
def test_it_is_the_kth_of_the_sorted(values, data, size, gather):
    rank = data.draw(st.integers(0, len(values) - 1))
    x = torch.tensor(values, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GATHER", gather)
        found = order_statistic(lambda: x.split(size), rank, len(values))
    assert found == sorted(values)[rank]


def test_duplicates_are_not_gathered(monkeypatch):
    monkeypatch.setattr(module, "GATHER", 8)
    x = torch.full((100,), -2.5, dtype=torch.float64)
    x[3] = 7.0
    assert order_statistic(lambda: x.split(9), 98, 100) == -2.5
    assert order_statistic(lambda: x.split(9), 99, 100) == 7.0


@pytest.mark.parametrize("rank", [-1, 2])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        order_statistic(lambda: [torch.zeros(2, dtype=torch.float64)], rank, 2)
