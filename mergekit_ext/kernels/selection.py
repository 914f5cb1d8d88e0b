"""Ranks among many numbers that are seen in pieces: exact thresholds, without a sort.

The bit patterns of floating-point numbers, with those of negative numbers reversed, are ordered as
the numbers are. Counting them by their leading 16 bits finds the bin in which the k-th falls; the
next 16 bits of what lies in that bin narrow it further, a pass for each digit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGIT = 16
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
# Numbers that are gathered at once: 32 MB of float64.
GATHER = 1 << 22


@dataclass(frozen=True)
class Cut:
    """Which entries are kept: those with a pattern above `pattern`, and the first `ties` at it."""

    pattern: int
    ties: int


EVERYTHING = Cut(-1, 0)


def patterns(values: Tensor) -> Tensor:
    """Return the bit patterns of magnitudes as integers; float32 or float64 input."""
    return values.abs().view(_BITS[values.dtype])


def cut_for(pieces: Callable[[], Iterable[Tensor]], keep: int, dtype: torch.dtype) -> Cut:
    """Return the cut that keeps the `keep` (at least 1) entries of largest magnitude.

    `pieces` gives the tensor (`dtype` float32 or float64, no NaN), piece by piece and in the same
    order, each time it is called. Entries of equal magnitude are kept in order.
    """
    return _searched(CutSearch(keep, dtype), pieces)


class CutSearch:
    """Incremental `cut_for`: each pass counts all pieces and ends with `advance`, until `done`."""

    bins = 1 << _DIGIT  # counters of a pass

    def __init__(self, keep: int, dtype: torch.dtype, *, signed: bool = False):
        self._keys = _ordered if signed else patterns
        # The leading digit of negative numbers is negative; with this it counts from 0.
        self._offset = self.bins // 2 if signed else 0
        self._wanted, self._prefix = keep, 0
        self._first = self.shift = torch.iinfo(_BITS[dtype]).bits - _DIGIT
        self._counts: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.shift < 0

    @property
    def cut(self) -> Cut:
        """The cut, exact once the search is done."""
        return Cut(self._prefix, self._wanted)

    def among(self, pieces: Iterable[Tensor]) -> Cut:
        """Return the cut in one pass, which gathers what shares the known digits."""
        known = self.shift + _DIGIT
        keys = map(self._keys, pieces)
        inside = torch.cat([found[(found >> known) == self._prefix] for found in keys])
        edge = int(inside.kthvalue(len(inside) - self._wanted + 1).values)
        return Cut(edge, self._wanted - int((inside > edge).sum()))

    def count(self, piece: Tensor) -> Tensor:
        """Return how many entries of a flat piece fall into each of the pass's `bins`; int64."""
        digits = self._keys(piece) >> self.shift
        if self.shift < self._first:
            digits = digits[(digits >> _DIGIT) == self._prefix] & (self.bins - 1)
        elif self._offset:
            digits += self._offset
        return torch.bincount(digits, minlength=self.bins)

    def take(self, counts: Tensor) -> None:
        """Add what `count` found, here or elsewhere; the search's own from then on."""
        self._counts = counts if self._counts is None else self._counts.add_(counts)

    def advance(self) -> int:
        """End a pass: one digit more of the cut is known. Return how many entries share it."""
        if self._counts is None:
            raise ValueError("pieces: found none; expected at least one")
        # How many lie at each digit or above it.
        above = self._counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= self._wanted).nonzero().max())
        inside = int(self._counts[digit])
        self._wanted -= int(above[digit]) - inside
        self._prefix = (self._prefix << _DIGIT) + digit - self._offset
        self._offset = 0
        self.shift -= _DIGIT
        self._counts = None
        return inside


def _searched(search: CutSearch, pieces: Callable[[], Iterable[Tensor]]) -> Cut:
    while not search.done:
        for piece in pieces():
            search.take(search.count(piece))
        if search.advance() <= GATHER and search.shift > 0:  # more than one pass is left
            return search.among(pieces())
    return search.cut


def order_statistic(pieces: Callable[[], Iterable[Tensor]], rank: int, count: int) -> float:
    """Return the number at index `rank` (from 0) of the sorted numbers.

    `pieces` gives the same float64 pieces, of any shapes and `count` numbers in all, each time it
    is called: once if they are few, mostly two or three times otherwise, five at most. -0.0 counts
    as 0.0; NaN sorts to an end.

    Raises:
        ValueError: `rank` is out of range.
    """
    if not 0 <= rank < count:
        raise ValueError(f"rank: found {rank!r}; expected 0 to {count - 1}")
    if count <= GATHER:
        numbers = torch.cat([piece.reshape(-1) for piece in pieces()])
        return float(numbers.kthvalue(rank + 1).values)
    key = _searched(CutSearch(count - rank, torch.float64, signed=True), pieces).pattern
    bits = key if key >= 0 else key ^ torch.iinfo(torch.int64).max
    return float(torch.tensor(bits).view(torch.float64)) + 0.0


def _ordered(piece: Tensor) -> Tensor:
    """Return signed integers that are ordered as the numbers are."""
    bits = piece.reshape(-1).view(torch.int64)
    return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)


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
