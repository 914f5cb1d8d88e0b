"""Who does what when several processes make one output.

One process is the ordinary case: `current()` is then `Ranks()`, whose every answer is its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")


class Ranks:
    """The processes of a merge, seen from one of them. This class: one process alone.

    Every process must make the same calls in the same order, `check` excepted.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes what there is one of: index, card, manifest."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The rank that each piece of work belongs to, by size: the largest first, each to the
        rank that has least to do, the lowest of several. Alike in all processes."""
        loads = [(0, rank) for rank in range(self.size)]
        owners = [0] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            load, rank = heapq.heappop(loads)
            owners[index] = rank
            heapq.heappush(loads, (load + sizes[index], rank))
        return owners

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, in order of rank, in every process."""
        return [value]

    def from_main(self, make: Callable[[], _T]) -> _T:
        """What `make` returns in the main process, in every process; it runs there only.

        An exception of the main process is raised in all of them.
        """
        return make()

    def wait(self) -> None:
        """Until every process has come here."""

    def check(self) -> None:
        """Raise if another process has failed. Cheap: call it between two pieces of work."""

    def post(self, message: Any) -> None:
        """Send the main process something that it takes from `received`, in order."""

    def received(self) -> list[Any]:
        """In the main process: what the others have posted since the last call."""
        return []


_current: list[Ranks] = [Ranks()]


def current() -> Ranks:
    """The processes that this one works with."""
    return _current[-1]


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Inside, `ranks` is what `current` returns."""
    _current.append(ranks)
    try:
        yield
    finally:
        _current.remove(ranks)
