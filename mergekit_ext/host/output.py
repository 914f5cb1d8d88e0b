"""The output of one merge: its staging directory, its listeners, its report, and its place."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_ext import parallel
from mergekit_ext.errors import ConfigError, MergekitExtError, Problem, RankError, StoppedError
from mergekit_ext.events import Dispatcher, JsonLines, MergeEnd, ProgressBar, ShardWritten
from mergekit_ext.flexmerge.manifest import SHARDS
from mergekit_ext.host import compat
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.host.out_config import agree
from mergekit_ext.host.session import Session
from mergekit_ext.io.journal import Journal
from mergekit_ext.io.staging import WEIGHTS, by_machine, staged
from mergekit_ext.report.card import append_section, write_report

EVENTS_VARIABLE = "MERGEKIT_EXT_EVENTS"
_KEPT = "What is finished is kept: the same command goes on with it, --restart starts over."
_GONE = "The hidden folder that it was written in is gone: the same command starts over."


@contextmanager
def output(
    options: MergeOptions,
    out_path: str,
    method: ExtMethod | None,
    callbacks: Iterable[object],
    source: str = "",
    identity: Mapping[str, str] | None = None,
    restart: bool = False,
) -> Iterator[Path]:
    """Yield the folder to merge into; then write the report, and put the folder in its place.

    Args:
        options: mergekit's; `quiet` switches the progress bar off.
        out_path: the folder that the output becomes.
        method: the method that reports; None for mergekit's own.
        callbacks: beside the progress bar and what the environment asks for.
        source: the text of the configuration.
        identity: whatever decides the output; with it the session has a journal, and what is
            finished is kept when the merge is stopped.
        restart: do not continue what an earlier merge has left.
    """
    with listening(options, callbacks, out_path, source) as session:
        with compat.local_cards(), _folder(session, out_path, identity, restart) as folder:
            yield folder
            agree(folder)
            if method is not None:
                details = {record.name: record.details for record in session.records}
                write_report(folder, method.spec.name, details, options.random_seed or 0)
                append_section(folder / "README.md", method.summary(session.records))
        if not parallel.current().is_main:
            return
        for shard in _shards(Path(out_path)):
            session.emit(ShardWritten(os.fspath(shard), shard.stat().st_size))
        session.emit(MergeEnd(out_path, time.perf_counter() - session.started))
        if method is not None:
            session.afterwards += method.warnings(session.records)
        session.warn(session.afterwards)


@contextmanager
def listening(
    options: MergeOptions, callbacks: Iterable[object], out_path: str = "", source: str = ""
) -> Iterator[Session]:
    """Yield a session with the progress bar, `callbacks` and what the environment asks for."""
    listeners = _listeners(options, callbacks) if parallel.current().is_main else []
    session = Session(Dispatcher(listeners), out_path, source)
    session.quiet = options.quiet
    try:
        try:
            with sessions.active(session):
                yield session
        finally:
            session.close()
    except KeyboardInterrupt:
        if session.journal is not None and not _is_gone(session) and parallel.current().is_main:
            print(_KEPT, file=sys.stderr)  # below the bar, which is closed now
        raise


def _listeners(options: MergeOptions, callbacks: Iterable[object]) -> list[object]:
    listeners: list[object] = [] if options.quiet else [ProgressBar()]
    listeners.extend(callbacks)
    if path := os.environ.get(EVENTS_VARIABLE):
        try:
            listeners.append(JsonLines(path))
        except OSError as error:
            problem = Problem(EVENTS_VARIABLE, f"{path} ({error.strerror})", "a file to append to")
            raise ConfigError([problem]) from None
    return listeners


@contextmanager
def _folder(
    session: Session, out_path: str, identity: Mapping[str, str] | None, restart: bool
) -> Iterator[Path]:
    """Yield the folder to merge into; beside the main process, one that goes with the staging."""
    together = parallel.current()
    try:
        with ExitStack() as stack:
            staging = together.from_main(
                lambda: stack.enter_context(staged(out_path, identity, restart))
            )
            session.staging = staging
            if staging.changed:
                changed = ", ".join(staging.changed)
                session.say(f"Starting over: not what was merged before ({changed}).")
            if identity is not None:
                session.journal = Journal(staging.path, together.rank)
            # No process adds a line before all have read the same ones.
            together.wait()
            folder = staging.output
            if not together.is_main:
                folder = staging.path / f".rank-{together.rank}" / folder.name
                folder.mkdir(parents=True, exist_ok=True)
            yield folder
    except RankError:
        raise RankError(_left(session)) from None
    except Exception as error:
        if identity is None or isinstance(error, MergekitExtError) or not by_machine(error):
            raise
        raise StoppedError(f"{_reason(error, session)}. {_left(session)}".rstrip()) from error


def _reason(error: BaseException, session: Session) -> str:
    """What stopped a merge; of a full disk, which."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full and session.staging is not None:
        return f"the disk of {session.staging.path.parent} is full ({error}): free some space there"
    return f"{type(error).__name__}: {error}"


def _left(session: Session) -> str:
    """What a merge that was stopped has left, and what to do with it; empty before it has begun."""
    if session.staging is None:
        return ""
    return _GONE if _is_gone(session) else _KEPT


def _is_gone(session: Session) -> bool:
    return session.staging is not None and not session.staging.path.exists()


def _shards(folder: Path) -> list[Path]:
    """The files of weights in `folder`, in order; shared ones once."""
    if (folder / SHARDS).is_dir():
        return sorted((folder / SHARDS).iterdir())
    return sorted(path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))
