"""The k-th smallest of many numbers that are seen in pieces: exact, without a sort of all of them.

The bit patterns of floating-point numbers, with those of negative numbers reversed, are ordered as
the numbers are. Counting them by their leading 16 bits tells in which bin the k-th falls; once a
bin is small enough, its numbers are gathered and the k-th is picked among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_DIGIT = 16
_SHIFTS = (48, 32, 16, 0)
# Numbers that are gathered at once: 32 MB of float64.
GATHER = 1 << 22


def order_statistic(pieces: Callable[[], Iterable[Tensor]], rank: int, count: int) -> float:
    """The number at index `rank` (from 0) of the sorted numbers.

    Args:
        pieces: gives the same float64 pieces, of any shapes, each time it is called. -0.0 counts
            as 0.0; NaN sorts to an end.
        rank: from 0 to ``count - 1``.
        count: how many numbers there are in all pieces.

    Reads the pieces once if they are few, mostly two or three times otherwise, five at most.

    Raises:
        ValueError: `rank` is out of range.
    """
    if not 0 <= rank < count:
        raise ValueError(f"rank: found {rank!r}; expected 0 to {count - 1}")
    prefix, shift, inside = 0, 64, count
    for finer in _SHIFTS:
        if inside <= GATHER:
            break
        counts = _histogram(pieces, finer, prefix)
        upto = counts.cumsum(0)
        digit = int((upto <= rank).sum())
        inside = int(counts[digit])
        rank -= int(upto[digit]) - inside
        prefix = digit - (1 << _DIGIT - 1) if shift == 64 else (prefix << _DIGIT) | digit
        shift = finer
    if shift == 0:
        # All 64 bits are known, so that what is left is one number, repeated.
        return next(float(found[0]) for found in _inside(pieces, 0, prefix) if found.numel())
    return float(torch.cat(list(_inside(pieces, shift, prefix))).kthvalue(rank + 1).values)


def _ordered(piece: Tensor) -> Tensor:
    """Signed integers that are ordered as the numbers are."""
    bits = piece.reshape(-1).view(torch.int64)
    return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)


def _histogram(pieces: Callable[[], Iterable[Tensor]], shift: int, prefix: int) -> Tensor:
    total: Tensor | None = None
    for piece in pieces():
        keys = _ordered(piece) >> shift
        if shift == _SHIFTS[0]:
            digits = keys + (1 << _DIGIT - 1)
        else:
            digits = keys[(keys >> _DIGIT) == prefix] & ((1 << _DIGIT) - 1)
        found = torch.bincount(digits, minlength=1 << _DIGIT)
        total = found if total is None else total.add_(found)
    if total is None:
        raise ValueError("pieces: found none; expected at least one")
    return total


def _inside(pieces: Callable[[], Iterable[Tensor]], shift: int, prefix: int) -> Iterable[Tensor]:
    for piece in pieces():
        flat = piece.reshape(-1)
        yield flat if shift == 64 else flat[(_ordered(piece) >> shift) == prefix]
