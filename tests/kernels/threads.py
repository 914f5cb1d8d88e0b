"""The same bytes with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

NUMBERS = (1, 2, 4)


def with_any_number_of_threads(work: Callable[[], Any]) -> Any:
    """What `work` returns, after seeing that it returns the same bytes with any number of threads.

    Results may be tensors, numbers, and sequences and mappings of them.
    """
    before = torch.get_num_threads()
    found = []
    try:
        for number in NUMBERS:
            torch.set_num_threads(number)
            found.append(work())
    finally:
        torch.set_num_threads(before)
    for number, result in zip(NUMBERS, found, strict=True):
        assert same(result, found[0]), f"other bytes with {number} threads than with one"
    return found[0]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, (str, bytes)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
