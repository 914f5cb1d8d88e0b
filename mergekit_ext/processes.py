"""The processes of one output, joined through a store of torch.distributed.

Nothing here blocks inside of torch: whoever waits asks the store again and again, and so hears
of a process that has failed or was killed, and of signals.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from mergekit_ext.errors import MergekitExtError, RankError
from mergekit_ext.ranks import Ranks

_T = TypeVar("_T")

_FAILURE = "failure"
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.0005, 0.02
# Between two pieces of work that take microseconds each, asking would take longer than working.
_BETWEEN_CHECKS = 0.05
_BETWEEN_POSTS = 0.25
_BEAT = 1.0
_LAST_SIGN = 10.0
_PART = 1 << 22  # torch's store refuses values of more than 8 MiB
_PARTING = 3.0


class Processes(Ranks):
    """Several processes, as one of them sees them.

    Args:
        store: a store of torch.distributed that all of them reach, and nobody else writes to.
        rank: the number of this process.
        size: how many there are.

    Attributes:
        failed: whether this process has told the others that it stops.

    Call `open` before and `close` after everything else. Every method may raise `RankError`.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self.rank, self.size = rank, size
        self.failed = False
        self._store = store
        self._turn = 0
        self._old: list[str] = []
        self._checked = 0.0
        self._posts: list[Any] = []
        self._posting = threading.Lock()
        self._received = 0
        self._silent: RankError | None = None
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def open(self) -> None:
        """Begin to give signs of life, and to look for those of the others."""
        self._heart.start()

    def close(self, error: BaseException | None = None) -> None:
        """Leave. After an error the others are told; after none, everybody has come here.

        The main process leaves last, so that the others can hear of its error, or of that of a
        third one, if they soon ask.
        """
        try:
            if error is None:
                self.wait()
            else:
                self.fail(error)
            self._ask("set", f"left/{self.rank}", b"")
            signalled = isinstance(error, RankError) and error.rank == self.rank
            if self.is_main and not signalled:
                self._see_off()
        finally:
            self._closing.set()
            # A thread that is inside of torch while the interpreter ends aborts the process.
            self._heart.join(timeout=_PARTING)

    def gather(self, value: _T) -> list[_T]:
        self.flush()
        turn = self._next_turn()
        self._put(f"{turn}/{self.rank}", value)
        found = [
            value if rank == self.rank else self._take(f"{turn}/{rank}")
            for rank in range(self.size)
        ]
        if self.is_main:
            # Who has come to this turn has read those before it.
            for key in self._old:
                self._drop(key)
            self._old = [f"{turn}/{rank}" for rank in range(self.size)]
        return found

    def from_main(self, make: Callable[[], _T]) -> _T:
        key = f"{self._next_turn()}/main"
        if not self.is_main:
            return self._take(key)
        try:
            made = make()
        except BaseException as error:
            self.fail(error)
            raise
        self._put(key, made)
        self._old.append(key)
        return made

    def wait(self) -> None:
        self.gather(None)

    def check(self) -> None:
        if time.monotonic() - self._checked < _BETWEEN_CHECKS:
            return
        if (failure := self.failure()) is not None and failure.rank != self.rank:
            raise failure
        if self._silent is not None:
            raise self._silent
        self._checked = time.monotonic()

    def post(self, message: Any) -> None:
        with self._posting:
            self._posts.append(message)

    def flush(self) -> None:
        """Send what was posted; done by itself several times a second, and before each `gather`."""
        with self._posting:
            if self._posts:
                number = self._ask("add", "posts", 1) - 1
                self._put(f"post/{number}", self._posts)
                self._posts = []

    def received(self) -> list[Any]:
        messages: list[Any] = []
        if not self.is_main:
            return messages
        count = self._ask("add", "posts", 0)
        # A post is counted first and sent then: what is not there yet comes next time.
        while self._received < count and self._ask("check", [key := f"post/{self._received}"]):
            messages += self._take(key)
            self._drop(key)
            self._received += 1
        return messages

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process stops, and why. The first of all errors counts."""
        if isinstance(error, RankError) and error.rank != self.rank:
            return  # they can see it themselves
        self.failed = True
        reason = error.reason if isinstance(error, RankError) else _described(error)
        # What an error of ours is about stays so; a full disk or a signal does not.
        resumable = getattr(error, "resumable", not isinstance(error, MergekitExtError))
        told = json.dumps([self.rank, reason, resumable])
        self._ask("compare_set", _FAILURE, "", told)

    def failure(self) -> RankError | None:
        """What the first process to fail has told, this one or another; None without one."""
        if not self._ask("check", [_FAILURE]):
            return None
        return RankError(*json.loads(self._ask("get", _FAILURE)))

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _put(self, key: str, value: Any) -> None:
        data = pickle.dumps(value)
        parts = range(0, len(data), _PART)
        for number, start in enumerate(parts):
            self._ask("set", f"{key}/{number}", data[start : start + _PART])
        # Last: who sees it finds the rest.
        self._ask("set", key, str(len(parts)))

    def _take(self, key: str) -> Any:
        sleep = _SHORTEST_SLEEP
        while not self._ask("check", [key]):
            self.check()
            time.sleep(sleep)
            sleep = min(2 * sleep, _LONGEST_SLEEP)
        parts = range(int(self._ask("get", key)))
        return pickle.loads(b"".join(self._ask("get", f"{key}/{number}") for number in parts))

    def _drop(self, key: str) -> None:
        for number in range(int(self._ask("get", key))):
            self._ask("delete_key", f"{key}/{number}")
        self._ask("delete_key", key)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, method)(*arguments)
        except RuntimeError:  # all errors of torch.distributed are
            reason = "neither it nor the launcher can be reached any more"
            raise RankError(0, reason) from None

    def _see_off(self) -> None:
        until = time.monotonic() + _PARTING
        for rank in range(1, self.size):
            while not self._ask("check", [f"left/{rank}"]) and time.monotonic() < until:
                time.sleep(_LONGEST_SLEEP)

    def _beat(self) -> None:
        seen = dict.fromkeys(range(self.size), (0, time.monotonic()))
        try:
            while not self._closing.wait(_BETWEEN_POSTS):
                self.flush()
                if time.monotonic() - seen[self.rank][1] >= _BEAT:
                    self._look_around(seen)
        except RankError as error:
            self._silent = error

    def _look_around(self, seen: dict[int, tuple[int, float]]) -> None:
        for rank, (count, when) in seen.items():
            now = time.monotonic()
            found = self._ask("add", f"beats/{rank}", 1 if rank == self.rank else 0)
            if found != count:
                seen[rank] = found, now
            elif now - when > _LAST_SIGN and not self._ask("check", [f"left/{rank}"]):
                raise RankError(rank, f"no sign of life for {_LAST_SIGN:.0f} seconds")


def _described(error: BaseException) -> str:
    if isinstance(error, MergekitExtError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    return text.removesuffix(": ")
