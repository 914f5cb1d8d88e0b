"""What is known while a merge runs: its listeners, and what its method reports of each tensor.

mergekit's tasks may run in threads and carry only plain values, so listeners cannot travel through
the graph. One merge runs at a time in a process; `current` returns its session.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergekit_ext import parallel
from mergekit_ext.errors import MergeWarning
from mergekit_ext.events import Dispatcher, Event
from mergekit_ext.io.journal import Journal
from mergekit_ext.io.planned import Entry
from mergekit_ext.io.staging import Staging


@dataclass(frozen=True)
class TensorRecord:
    """What a method reports of one output tensor."""

    name: str
    size: int
    details: Mapping[str, Any]


class Session:
    """Listeners and records of one merge.

    Attributes:
        output: the folder that the output becomes.
        source: the text of the configuration.
        quiet: whether `say` says nothing.
        staging: where the output is written, the same in all processes.
        journal: what is finished of it; None for merges that cannot be continued.
        predicted: the output's tensors as far as headers give them; None for the others.
        order: the names of the output's tensors, in which `records` come.
        afterwards: warnings for when the output stands; one that is an error must not cost it.
    """

    def __init__(self, dispatcher: Dispatcher | None = None, output: str = "", source: str = ""):
        self.output = output
        self.source = source
        self.quiet = True
        self.staging: Staging | None = None
        self.journal: Journal | None = None
        self.predicted: Mapping[str, Entry | None] = {}
        self.order: Sequence[str] = ()
        self.afterwards: list[MergeWarning] = []
        self.started = time.perf_counter()
        self._dispatcher = dispatcher or Dispatcher()
        self._lock = threading.Lock()
        self._records: dict[str, TensorRecord] = {}
        self._warned: set[type[MergeWarning]] = set()

    def close(self) -> None:
        """Close the journal, and the files and bars of the listeners."""
        if self.journal is not None:
            self.journal.close()
        self._dispatcher.close()

    def say(self, line: str) -> None:
        """Print a line for a user who watches the command."""
        if not self.quiet and parallel.current().is_main:
            print(line, file=sys.stderr)

    def warn(self, found: Iterable[MergeWarning]) -> None:
        """Issue warnings, one of each kind: a thousand tensors are one reason."""
        if not parallel.current().is_main:
            return
        for warning in found:
            if type(warning) not in self._warned:
                self._warned.add(type(warning))
                warnings.warn(warning, stacklevel=3)

    def emit(self, event: Event) -> None:
        """Hand an event to the listeners, which are in the main process."""
        if parallel.current().is_main:
            self.relay()
            self._dispatcher.emit(event)
        elif event.every_process:
            parallel.current().post(event)

    def relay(self) -> None:
        """Emit the events of other processes that a `gather` has brought since the last call."""
        for event in parallel.current().received():
            self._dispatcher.emit(event)

    def size_of(self, name: str) -> int:
        """Return about how many bytes tensor `name` will have, as a measure of its work.

        A tensor that no header predicts is most often the embedding, which is the largest.
        """
        if (entry := self.predicted.get(name)) is not None:
            return entry.nbytes
        return max((e.nbytes for e in self.predicted.values() if e is not None), default=0)

    def record(self, record: TensorRecord) -> None:
        """Keep what a method reports; a method that wraps another adds to its report."""
        with self._lock:
            details = {**self.details(record.name), **record.details}
            self._records[record.name] = TensorRecord(record.name, record.size, details)

    def find(self, name: str) -> TensorRecord | None:
        """Return what was recorded of tensor `name`."""
        return self._records.get(name)

    def details(self, name: str) -> Mapping[str, Any]:
        """Return the details recorded of tensor `name`; empty if there are none."""
        record = self._records.get(name)
        return record.details if record else {}

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The records in the order of the output, whatever the order of the work."""
        names = {name: None for name in (*self.order, *self._records) if name in self._records}
        return tuple(self._records[name] for name in names)


_active: list[Session] = []
_one_at_a_time = threading.RLock()


def current() -> Session | None:
    """Return the session of the merge that is running, if any."""
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
