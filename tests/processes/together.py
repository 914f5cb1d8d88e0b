"""Threads of one process that see each other as the processes of a merge."""

from __future__ import annotations

import threading
from collections import defaultdict

from mergekit_ext.errors import RankError
from mergekit_ext.parallel import Ranks, joined

_here = threading.local()


class Meeting:
    """What threads have brought to each of their exchanges, and which have ended with an error."""

    def __init__(self):
        self.values, self.ended = defaultdict(dict), set()
        self.changed = threading.Condition()


class _OfThread:
    """The processes of the thread that asks."""

    def __getattr__(self, name):
        return getattr(_here.ranks, name)


class ThreadRanks(Ranks):
    """The processes, seen from one thread."""

    def __init__(self, rank, size, meeting):
        super().__init__(rank, size)
        self._meeting, self._turn = meeting, 0

    def _exchange(self, value):
        self._turn += 1
        here = self._meeting.values[self._turn]
        with self._meeting.changed:
            here[self.rank] = value
            self._meeting.changed.notify_all()
            self._meeting.changed.wait_for(
                lambda: len(here) == self.size or self._meeting.ended - here.keys(), 60
            )
        if len(here) < self.size:
            raise RankError
        return [here[rank] for rank in range(self.size)]


def together(work, size=2):
    """Run `work` with the ranks of each of `size` threads; what each returned or raised.

    `ranks.current` returns them, too.
    """
    meeting, found = Meeting(), [None] * size

    def run(rank):
        ranks = _here.ranks = ThreadRanks(rank, size, meeting)
        try:
            found[rank] = work(ranks)
            ranks.wait()
        except BaseException as error:
            found[rank] = error
            with meeting.changed:
                meeting.ended.add(rank)
                meeting.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    with joined(_OfThread()):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return found
