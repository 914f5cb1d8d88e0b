"""Which process does what when several make one output.

One process is the ordinary case: `current` then returns `Ranks()`, which needs no other process.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeVar

from mergekit_ext.errors import RankError

_T = TypeVar("_T")


class _Mark(Enum):
    """What a process that ends sends in place of a value; pickled by name."""

    PARTED = "parted"


class Ranks:
    """The processes of a merge, seen from one of them. This class: one process alone.

    Every process makes the same calls of `gather`, `from_main` and `wait` in the same order. When
    another process has ended, or has called `part`, they raise `RankError`.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._posted: list[Any] = []
        self._received: list[Any] = []

    @property
    def is_main(self) -> bool:
        """Whether this process writes what exists once: index, card, manifest."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return the rank that each piece of work belongs to.

        The largest piece comes first; each goes to the rank with the least work, the lowest of
        several. The answer is the same in all processes.
        """
        loads = [(0, rank) for rank in range(self.size)]
        owners = [0] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            load, rank = heapq.heappop(loads)
            owners[index] = rank
            heapq.heappush(loads, (load + sizes[index], rank))
        return owners

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in order of rank, in every process."""
        posted, self._posted = self._posted, []
        found = self._exchange((value, posted))
        if self.is_main:
            self._received += [message for _, messages in found for message in messages]
        values = [value for value, _ in found]
        if value is not _Mark.PARTED and any(v is _Mark.PARTED for v in values):
            raise RankError
        return values

    def from_main(self, make: Callable[[], _T]) -> _T:
        """Return in every process what `make` returns in the main one; it runs there only."""
        found: list[Any] = self.gather(make() if self.is_main else None)
        made: _T = found[0]
        return made

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.gather(None)

    def part(self) -> None:
        """End with an error of this process: whatever the others gather, they get `RankError`.

        Raises:
            RankError: another process has ended before.
        """
        self.gather(_Mark.PARTED)

    def post(self, message: Any) -> None:
        """Send the main process a message with the next `gather`."""
        self._posted.append(message)

    def received(self) -> list[Any]:
        """Return, in the main process, the messages since the last call, in order of rank."""
        messages, self._received = self._received, []
        return messages

    def _exchange(self, value: _T) -> list[_T]:
        return [value]


class Group(Ranks):
    """The processes of torch.distributed's default group, whose backend is gloo."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rank, self.size = rank, size

    def _exchange(self, value: _T) -> list[_T]:
        import torch.distributed as distributed

        found: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(found, value)
        except RuntimeError:  # all errors of torch.distributed are: a connection was closed
            raise RankError from None
        return found


_current: list[Ranks] = [Ranks()]


def current() -> Ranks:
    """Return the processes that this one works with."""
    return _current[-1]


@contextmanager
def joined(ranks: Ranks) -> Iterator[Ranks]:
    """Inside, `current` returns `ranks`."""
    _current.append(ranks)
    try:
        yield ranks
    finally:
        _current.remove(ranks)
