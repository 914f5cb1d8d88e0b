"""One merge while it runs: its listeners, the records of its tensors, and its output.

mergekit's tasks carry plain values only, and may run in threads: `current` is their session.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit.options import MergeOptions

from mergekit_ext import parallel
from mergekit_ext.core.commands import ending
from mergekit_ext.errors import MergekitExtError, MergeWarning, RankError, StoppedError, warn
from mergekit_ext.events import Dispatcher, Event, JsonLines, MergeEnd, ProgressBar, ShardWritten
from mergekit_ext.flexmerge.manifest import SHARDS
from mergekit_ext.host.blocks import block_of
from mergekit_ext.host.out_config import agree
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.journal import Journal
from mergekit_ext.io.model_files import classes_of
from mergekit_ext.io.solution import Solution
from mergekit_ext.io.staging import WEIGHTS, Staging, by_machine, staged
from mergekit_ext.report import card
from mergekit_ext.report.rho import rho_of

if TYPE_CHECKING:
    from mergekit_ext.host.method import ExtMethod
    from mergekit_ext.host.planner import PlannedWriter

EVENTS_VARIABLE = "MERGEKIT_EXT_EVENTS"
_KEPT = "What is finished is kept: the same command goes on with it, --restart starts over."


class TensorRecord(NamedTuple):
    """What a method reports of one output tensor."""

    name: str
    size: int
    details: Mapping[str, Any]


class Session:
    """Listeners and records of one merge."""

    def __init__(self, dispatcher: Dispatcher | None = None, output: str = "", quiet: bool = True):
        self.output, self.quiet = output, quiet
        self.staging: Staging | None = None
        # What is finished of the output; None for merges that cannot be continued.
        self.journal: Journal | None = None
        self.writer: PlannedWriter | None = None
        self.solution: Solution | None = None
        # The output's tensors as far as headers give them; None for the others.
        self.predicted: Mapping[str, TensorHeader | None] = {}
        self.operations: Mapping[str, float] = {}  # of tensors, if the method's products take long
        # The names of the output's tensors, in which `records` come.
        self.order: Sequence[str] = ()
        self.recorded: dict[str, TensorRecord] = {}
        # Lines and warnings for when the output stands; one that is an error must not cost it.
        self.summary = ""
        self.parameters, self.paper, self.task = "", "", ""  # that are in effect; one that loads
        self.dequantised: Mapping[str, str] = {}  # inputs, by what they are stored in
        self.afterwards: list[MergeWarning] = []
        self.started = time.perf_counter()
        self._dispatcher = dispatcher or Dispatcher()
        self._lock = threading.Lock()
        self._warned: set[type[MergeWarning]] = set()

    @property
    def stored(self) -> dict[str, Any]:
        """What a report says of inputs that are dequantised."""
        return {"dequantised": self.dequantised} if self.dequantised else {}

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
                warn(warning)

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

    def work_of(self, name: str) -> float:
        """Return a measure of the work on tensor `name`: operations, where counted, or bytes."""
        if any(self.operations.values()):
            return self.operations.get(name, 0.0)
        # A tensor that no header predicts is most often the embedding, which is the largest.
        if (entry := self.predicted.get(name)) is not None:
            return entry.nbytes
        return max((e.nbytes for e in self.predicted.values() if e is not None), default=0)

    def record(self, record: TensorRecord) -> None:
        """Keep what a method reports; a method that wraps another adds to its report."""
        with self._lock:
            before = self.recorded.get(record.name)
            details = {**(before.details if before else {}), **record.details}
            self.recorded[record.name] = record._replace(details=details)

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The records in the order of the output, whatever the order of the work."""
        names = dict.fromkeys((*self.order, *self.recorded))
        return tuple(self.recorded[name] for name in names if name in self.recorded)


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


@contextmanager
def listening(
    options: MergeOptions, callbacks: Iterable[object], out_path: str = ""
) -> Iterator[Session]:
    """Yield a session with the progress bar, `callbacks` and what the environment asks for."""
    listeners: list[object] = []
    if parallel.current().is_main:
        listeners += [*([] if options.quiet else [ProgressBar()]), *callbacks]
        if path := os.environ.get(EVENTS_VARIABLE):
            listeners.append(JsonLines(path, EVENTS_VARIABLE))
    session = Session(Dispatcher(listeners), out_path, options.quiet)
    try:
        with closing(session), active(session):
            yield session
    except KeyboardInterrupt:
        if session.journal is not None and parallel.current().is_main:
            print(_left(session), file=sys.stderr)  # below the bar, which is closed now
        raise


@contextmanager
def output(
    options: MergeOptions,
    out_path: str,
    method: "ExtMethod | None",
    callbacks: Iterable[object],
    identity: Mapping[str, str] | None = None,
    restart: bool = False,
    stock: str = "",
) -> Iterator[Path]:
    """Yield the folder to merge into; then write the report, and put the folder in its place.

    `method` reports; None for mergekit's own, called `stock`, and for what reports itself. With an
    `identity`, which is whatever decides the output, what is finished is kept when the merge is
    stopped, for the next one to go on with.
    """
    with listening(options, callbacks, out_path) as session:
        with _folder(session, out_path, identity, restart) as folder:
            yield folder
            if not parallel.current().is_main:  # which may have put the output in its place by now
                return
            agree(folder)
            page, sections = folder / card.CARD, list[str]()
            details = {record.name: record.details for record in session.records}
            if name := stock if method is None else method.spec.name:
                far = rho_of(details, block_of)
                seed = options.random_seed or 0
                card.write_report(folder, name, details, seed, **far.stored, **session.stored)
                sections.append(far.line)
                session.summary = far.line
                session.afterwards += far.warnings(name)
            if method is not None:
                sections.append(method.summary(session.records))
            copied = {n: d["copied_from"] for n, d in details.items() if "copied_from" in d}
            sections.append(card.copies_section(session.order, copied))
            sections.append(card.quantised_section(session.dequantised))
            sections.append(card.method_section(session.parameters, session.paper))
            if page.exists():
                text, place = page.read_text(encoding="utf-8"), folder / session.task
                text = card.model_card(*classes_of(place), folder.name, text, session.task)
                text = "\n\n".join([text.rstrip(), *filter(None, sections)])
                page.write_text(f"{text}\n", encoding="utf-8")
        place, following = Path(out_path), f'from_pretrained("{out_path}"), in transformers'
        if (place / SHARDS).is_dir():  # which the tasks of a FlexMerge share
            shards = list((place / SHARDS).iterdir())
            following = f"mergekit-ext export {out_path} TASK FOLDER, or flexmerge.load in Python"
        elif method is None and not stock:  # a base and adapters
            shards = list(place.glob("*/*.safetensors"))
            following = f"load or serve it as {place / card.CARD} shows"
        else:
            shards = [path for path in place.iterdir() if WEIGHTS.fullmatch(path.name)]
        for shard in sorted(shards):
            session.emit(ShardWritten(os.fspath(shard), shard.stat().st_size))
        seconds = time.perf_counter() - session.started
        session.emit(MergeEnd(out_path, seconds))
        if session.summary:
            session.say(session.summary)
        if method is not None:
            session.afterwards += method.warnings(session.records)
        session.warn(session.afterwards)
        session.say(ending(out_path, seconds, following, session.parameters))


@contextmanager
def _folder(
    session: Session, out_path: str, identity: Mapping[str, str] | None, restart: bool
) -> Iterator[Path]:
    """Yield the folder to merge into; beside the main process, one that goes with the staging."""
    processes = parallel.current()
    try:
        with ExitStack() as stack:
            place = staged(out_path, identity, restart)
            staging = processes.from_main(lambda: stack.enter_context(place))
            session.staging = staging
            if staging.changed:
                changed = ", ".join(staging.changed)
                session.say(f"Starting over: not what was merged before ({changed}).")
            if staging.replaces:
                session.say(f"The model that is in {out_path} gives way when this one is complete.")
            if identity is not None:
                session.journal = Journal(staging.path, processes.rank)
            # No process adds a line before all have read the same ones.
            processes.wait()
            if processes.is_main:
                yield staging.output
            else:
                own = staging.path / f".rank-{processes.rank}" / staging.output.name
                own.mkdir(parents=True, exist_ok=True)
                yield own
    except RankError:
        raise RankError(_left(session)) from None
    except Exception as error:
        if identity is None or isinstance(error, MergekitExtError) or not by_machine(error):
            raise
        reason = f"{type(error).__name__}: {error}."
        raise StoppedError(f"{reason} {_left(session)}".rstrip()) from error


def _left(session: Session) -> str:
    """Say how a stopped merge goes on; "" before it has begun, and if what it left is gone."""
    return _KEPT if session.staging is not None and session.staging.path.exists() else ""
