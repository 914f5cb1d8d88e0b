"""The best ranks by trying all."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product


def best_gain(
    gains: Sequence[Sequence[float]], costs: Sequence[int], budget: int, multiple: int
) -> Fraction:
    """The largest sum of gains of leading triplets whose cost is within the budget."""
    choices = [sorted({*range(0, len(of_one), multiple), len(of_one)}) for of_one in gains]
    return max(
        sum(
            (Fraction(g) for of_one, r in zip(gains, ranks, strict=True) for g in of_one[:r]),
            Fraction(),
        )
        for ranks in product(*choices)
        if sum(c * r for c, r in zip(costs, ranks, strict=True)) <= budget
    )
