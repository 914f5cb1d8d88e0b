"""The k largest magnitudes of a tensor that is seen in pieces: an exact threshold, no sort.

Non-negative floating-point numbers are ordered as their bit patterns are. Counting the patterns
by their leading 16 bits, then those in the bin where the k-th falls by the next 16, finds the k-th
largest magnitude exactly, in two passes (four for float64) and with two counters' worth of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGIT = 16
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Cut:
    """Which entries are kept: those with a pattern above `pattern`, and the first `ties` at it."""

    pattern: int
    ties: int


EVERYTHING = Cut(-1, 0)


def patterns(values: Tensor) -> Tensor:
    """The magnitudes' bit patterns as integers; float32 or float64 input."""
    return values.abs().view(_BITS[values.dtype])


def cut_for(pieces: Callable[[], Iterable[Tensor]], keep: int, dtype: torch.dtype) -> Cut:
    """Find the cut that keeps the `keep` entries of largest magnitude.

    Args:
        pieces: gives the tensor, piece by piece and in the same order, each time it is called.
        keep: how many to keep, from 1 to the number of entries; entries of equal magnitude are
            kept in order.
        dtype: float32 or float64, that of the pieces. No NaN.
    """
    prefix, wanted = 0, keep
    total = torch.iinfo(_BITS[dtype]).bits
    for shift in range(total - _DIGIT, -1, -_DIGIT):
        counts = _count(pieces, shift, prefix, first=shift == total - _DIGIT)
        # How many lie at each digit or above it.
        above = counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= wanted).nonzero().max())
        wanted -= int(above[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
    return Cut(prefix, wanted)


def _count(
    pieces: Callable[[], Iterable[Tensor]], shift: int, prefix: int, *, first: bool
) -> Tensor:
    counts: Tensor | None = None
    for piece in pieces():
        bits = patterns(piece)
        leading = bits >> shift
        if not first:
            leading = leading[(leading >> _DIGIT) == prefix] & ((1 << _DIGIT) - 1)
        found = torch.bincount(leading, minlength=1 << _DIGIT)
        counts = found if counts is None else counts.add_(found)
    if counts is None:
        raise ValueError("cut_for: found no pieces; expected at least one")
    return counts


class Keeper:
    """Applies a cut to the pieces of a tensor, in order."""

    def __init__(self, cut: Cut):
        self._cut, self._ties = cut, cut.ties

    def drop(self, piece: Tensor) -> Tensor:
        """Set to zero, in place, what the cut does not keep; return `piece`."""
        if self._cut is EVERYTHING:
            return piece
        bits = patterns(piece)
        lost = bits < self._cut.pattern
        tied = bits == self._cut.pattern
        count = int(tied.sum())
        if count > self._ties:
            lost |= tied & (tied.cumsum(0) > self._ties)
        self._ties = max(0, self._ties - count)
        return piece.masked_fill_(lost, 0.0)
