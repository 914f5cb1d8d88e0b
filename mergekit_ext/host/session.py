"""What is known while a merge runs: who listens, and what each method reported of each tensor.

mergekit builds tasks that it may run in threads and that carry only plain values, so a merge's
listeners cannot travel through the graph. One merge runs at a time in a process; `current`
returns its session.
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

from mergekit_ext.errors import MergeWarning
from mergekit_ext.events import (
    BlockMerged,
    Dispatcher,
    Event,
    SolverIteration,
    TensorMeasured,
    TensorMerged,
)
from mergekit_ext.io.journal import Journal
from mergekit_ext.io.planned import Entry
from mergekit_ext.io.staging import Staging
from mergekit_ext.parallel import ranks

# What every process of a merge has its own of; the rest is said once, by the main one.
_SHARED_OUT = (BlockMerged, SolverIteration, TensorMeasured, TensorMerged)


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
        predicted: the output's tensors as far as headers tell; None for those they do not tell.
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
        """Let the listeners close their files and bars."""
        if self.journal is not None:
            self.journal.close()
        self._dispatcher.close()

    def say(self, line: str) -> None:
        """Tell who watches the command something in passing."""
        if not self.quiet and ranks.current().is_main:
            print(line, file=sys.stderr)

    def warn(self, found: Iterable[MergeWarning]) -> None:
        """Issue warnings, one of each kind: a thousand tensors are one reason."""
        if not ranks.current().is_main:
            return
        for warning in found:
            if type(warning) not in self._warned:
                self._warned.add(type(warning))
                warnings.warn(warning, stacklevel=3)

    def emit(self, event: Event) -> None:
        """Tell the listeners, who are in the main process."""
        if ranks.current().is_main:
            self.relay()
            self._dispatcher.emit(event)
        elif isinstance(event, _SHARED_OUT):
            ranks.current().post(event)

    def relay(self) -> None:
        """Emit the events of other processes that a `gather` has brought since the last call."""
        for event in ranks.current().received():
            self._dispatcher.emit(event)

    def size_of(self, name: str) -> int:
        """About how much work tensor `name` is, in bytes: those that it will have.

        What no header tells is most often the embedding, which is the largest.
        """
        entry = self.predicted.get(name)
        if entry is not None:
            return entry.nbytes
        return max((e.nbytes for e in self.predicted.values() if e is not None), default=0)

    def record(self, record: TensorRecord) -> None:
        """Keep what a method reports; a method that wraps another adds to what that one said."""
        with self._lock:
            details = {**self.details(record.name), **record.details}
            self._records[record.name] = TensorRecord(record.name, record.size, details)

    def find(self, name: str) -> TensorRecord | None:
        """What was recorded of tensor `name`."""
        return self._records.get(name)

    def details(self, name: str) -> Mapping[str, Any]:
        """What was recorded of tensor `name`; empty if nothing was."""
        record = self._records.get(name)
        return record.details if record else {}

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """In the order of the output, whatever the order of the work."""
        names = {name: None for name in (*self.order, *self._records) if name in self._records}
        return tuple(self._records[name] for name in names)


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
