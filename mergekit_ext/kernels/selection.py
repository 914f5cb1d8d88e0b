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
    search = CutSearch(keep, dtype)
    while not search.done:
        for piece in pieces():
            search.add(piece)
        search.advance()
    return search.cut


class CutSearch:
    """`cut_for` for whom a pass over the pieces is dear: feed each pass with `add`, end it with
    `advance`, until `done`. Pieces may be counted elsewhere: `count` there, `take` here.

    Attributes:
        bins: how many counters a pass has.
    """

    bins = 1 << _DIGIT

    def __init__(self, keep: int, dtype: torch.dtype):
        self._wanted, self._prefix = keep, 0
        self._first = self._shift = torch.iinfo(_BITS[dtype]).bits - _DIGIT
        self._counts: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether `cut` is known."""
        return self._shift < 0

    @property
    def cut(self) -> Cut:
        """The cut, exact once the search is done."""
        return Cut(self._prefix, self._wanted)

    def add(self, piece: Tensor) -> None:
        """Count one piece of this pass; flat, of the search's dtype."""
        self.take(self.count(piece))

    def count(self, piece: Tensor) -> Tensor:
        """How many entries of a piece fall into each of the pass's `bins`; int64."""
        bits = patterns(piece)
        leading = bits >> self._shift
        if self._shift != self._first:
            leading = leading[(leading >> _DIGIT) == self._prefix] & ((1 << _DIGIT) - 1)
        return torch.bincount(leading, minlength=self.bins)

    def take(self, counts: Tensor) -> None:
        """Add what `count` found, here or elsewhere; the search's own from then on."""
        self._counts = counts if self._counts is None else self._counts.add_(counts)

    @property
    def taken(self) -> Tensor:
        """The sum of what this pass has been given so far."""
        return torch.zeros(self.bins, dtype=torch.int64) if self._counts is None else self._counts

    def advance(self) -> None:
        """End a pass: one digit more of the cut is known."""
        if self._counts is None:
            raise ValueError("cut_for: found no pieces; expected at least one")
        # How many lie at each digit or above it.
        above = self._counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= self._wanted).nonzero().max())
        self._wanted -= int(above[digit] - self._counts[digit])
        self._prefix = (self._prefix << _DIGIT) | digit
        self._shift -= _DIGIT
        self._counts = None


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
