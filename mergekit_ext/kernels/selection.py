"""Ranks among many numbers that are seen in pieces: exact thresholds, without a sort.

The bit patterns of floating-point numbers, with those of negative numbers reversed, are ordered as
the numbers are. Counting them by their leading 16 bits finds the bin in which the k-th falls; the
next 16 bits of what lies in that bin narrow it further, a pass for each digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    search = CutSearch(keep, dtype)
    while not search.done:
        for piece in pieces():
            search.take(search.count(piece))
        if search.advance() <= GATHER and search.shift > 0:  # more than one pass is left
            return search.among(pieces())
    return search.cut


class CutSearch:
    """Incremental `cut_for`: each pass counts all pieces and ends with `advance`, until `done`."""

    bins = 1 << _DIGIT  # counters of a pass

    def __init__(self, keep: int, dtype: torch.dtype):
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
        keys = map(patterns, pieces)
        inside = torch.cat([found[(found >> known) == self._prefix] for found in keys])
        edge = int(inside.kthvalue(len(inside) - self._wanted + 1).values)
        return Cut(edge, self._wanted - int((inside > edge).sum()))

    def count(self, piece: Tensor) -> Tensor:
        """Return how many entries of a flat piece fall into each of the pass's `bins`; int64."""
        return torch.bincount(self._digits(patterns(piece)), minlength=self.bins)

    def _digits(self, keys: Tensor) -> Tensor:
        leading = keys >> self.shift
        if self.shift == self._first:
            return leading
        return leading[(leading >> _DIGIT) == self._prefix] & (self.bins - 1)

    def take(self, counts: Tensor) -> None:
        """Add what `count` found, here or elsewhere; the search's own from then on."""
        self._counts = counts if self._counts is None else self._counts.add_(counts)

    @property
    def taken(self) -> Tensor:
        return torch.zeros(self.bins, dtype=torch.int64) if self._counts is None else self._counts

    def advance(self) -> int:
        """End a pass: one digit more of the cut is known. Return how many entries share it."""
        if self._counts is None:
            raise ValueError("pieces: found none; expected at least one")
        # How many lie at each digit or above it.
        above = self._counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= self._wanted).nonzero().max())
        inside = int(self._counts[digit])
        self._wanted -= int(above[digit]) - inside
        self._prefix = (self._prefix << _DIGIT) | digit
        self.shift -= _DIGIT
        self._counts = None
        return inside


class _SignedSearch(CutSearch):
    """The same search over float64 numbers with their signs, largest first."""

    def __init__(self, wanted: int):
        super().__init__(wanted, torch.float64)
        # The leading digit of negative numbers is negative; with this it counts from 0.
        self._offset = 1 << _DIGIT - 1

    def count(self, piece: Tensor) -> Tensor:
        digits = self._digits(_ordered(piece)) + self._offset
        return torch.bincount(digits, minlength=self.bins)

    def advance(self) -> int:
        inside = super().advance()
        self._prefix -= self._offset
        self._offset = 0
        return inside

    def inside(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the numbers that share all digits that are known."""
        for piece in pieces:
            flat, known = piece.reshape(-1), self.shift + _DIGIT
            whole = self.shift == self._first
            yield flat if whole else flat[(_ordered(flat) >> known) == self._prefix]


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
    search, inside = _SignedSearch(count - rank), count
    while inside > GATHER and not search.done:
        for piece in pieces():
            search.take(search.count(piece))
        inside = search.advance()
    if search.done:  # all 64 bits are known, so that what is left is one number, repeated
        return next(float(found[0]) for found in search.inside(pieces()) if found.numel())
    left = torch.cat(list(search.inside(pieces())))
    return float(left.kthvalue(inside - search.cut.ties + 1).values)


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
