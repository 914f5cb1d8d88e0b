"""`kernels.ranks` against all possible ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.kernels.ranks import allocate
from tests.reference.ranks import best_gain

spectra = st.lists(
    st.lists(st.integers(0, 40), max_size=5).map(lambda v: sorted(map(float, v), reverse=True)),
    min_size=1,
    max_size=4,
)


def tensors(gains: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(values, dtype=torch.float64) for values in gains]


def costs_of(data: st.DataObject, gains: list[list[float]]) -> list[int]:
    count = len(gains)
    return data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))


@given(spectra, st.integers(0, 60), st.integers(1, 3), st.data())
def test_the_gain_is_within_one_step_of_the_best(
    gains: list[list[float]], budget: int, multiple: int, data: st.DataObject
) -> None:
    costs = costs_of(data, gains)
    ranks = allocate(tensors(gains), costs, budget=budget, multiple=multiple)
    gain = sum(sum(g[:r]) for g, r in zip(gains, ranks, strict=True))
    best = best_gain(gains, costs, budget, multiple)
    step = max(
        (sum(g[k : k + multiple]) for g in gains for k in range(0, len(g), multiple)), default=0
    )
    assert sum(c * r for c, r in zip(costs, ranks, strict=True)) <= budget
    assert best - step <= gain <= best
    if len(set(costs)) == 1 and multiple == 1:
        assert gain == best


@given(spectra, st.integers(0, 20), st.data())
def test_ranks_that_are_held_are_taken_whatever_they_gain(
    gains: list[list[float]], budget: int, data: st.DataObject
) -> None:
    costs, least = costs_of(data, gains), [data.draw(st.integers(0, len(g))) for g in gains]
    held = sum(c * r for c, r in zip(costs, least, strict=True))
    ranks = allocate(tensors(gains), costs, budget=held + budget, least=least)
    rest = [values[n:] for values, n in zip(gains, least, strict=True)]
    further = allocate(tensors(rest), costs, budget=budget)
    assert ranks == tuple(n + k for n, k in zip(least, further, strict=True))


@given(spectra, st.floats(0.0, 1.0))
def test_a_goal_is_reached_with_the_fewest_triplets(gains: list[list[float]], share: float) -> None:
    goal = share * sum(map(sum, gains))
    ranks = allocate(tensors(gains), [1] * len(gains), goal=goal)
    best = sorted((g for values in gains for g in values), reverse=True)
    least = next(n for n in range(len(best) + 1) if math.fsum(best[:n]) >= goal)
    gain = math.fsum(g for values, r in zip(gains, ranks, strict=True) for g in values[:r])
    assert gain >= goal and sum(ranks) == least


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]])
def test_gains_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="none above the one before"):
        allocate(tensors([wrong]), [1], budget=5)
