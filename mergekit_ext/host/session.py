"""What is known while a merge runs: who listens, and what each method reported of each tensor.

mergekit builds tasks that it may run in threads and that carry only plain values, so a merge's
listeners cannot travel through the graph. One merge runs at a time in a process; `current`
returns its session.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergekit_ext.errors import MergeWarning
from mergekit_ext.events import Dispatcher, Event


@dataclass(frozen=True)
class TensorRecord:
    """What a method reports of one output tensor."""

    name: str
    size: int
    details: Mapping[str, Any]


class Session:
    """Listeners and records of one merge."""

    def __init__(self, dispatcher: Dispatcher | None = None, output: str = "", source: str = ""):
        self.output = output
        self.source = source
        self.started = time.perf_counter()
        self._dispatcher = dispatcher or Dispatcher()
        self._lock = threading.Lock()
        self._records: dict[str, TensorRecord] = {}
        self._warned: set[type[MergeWarning]] = set()

    def close(self) -> None:
        """Let the listeners close their files and bars."""
        self._dispatcher.close()

    def warn(self, found: Iterable[MergeWarning]) -> None:
        """Issue warnings, one of each kind: a thousand tensors are one reason."""
        for warning in found:
            if type(warning) not in self._warned:
                self._warned.add(type(warning))
                warnings.warn(warning, stacklevel=3)

    def emit(self, event: Event) -> None:
        self._dispatcher.emit(event)

    def record(self, record: TensorRecord) -> None:
        """Keep what a method reports; a method that wraps another adds to what that one said."""
        with self._lock:
            details = {**self.details(record.name), **record.details}
            self._records[record.name] = TensorRecord(record.name, record.size, details)

    def details(self, name: str) -> Mapping[str, Any]:
        """What was recorded of tensor `name`; empty if nothing was."""
        record = self._records.get(name)
        return record.details if record else {}

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        return tuple(self._records.values())


_active: list[Session] = []
_one_at_a_time = threading.RLock()


def current() -> Session | None:
    """The session of the merge that is running, if any."""
    return _active[-1] if _active else None


@contextmanager
def active(session: Session) -> Iterator[Session]:
    """Make `session` the current one for a block of code; other threads wait for their turn."""
    with _one_at_a_time:
        _active.append(session)
        try:
            yield session
        finally:
            _active.remove(session)
