"""The output of one merge: its hidden room, who listens, the report, and its place at the end."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_ext import ranks
from mergekit_ext.errors import ConfigError, MergekitExtError, Problem, RankError, StoppedError
from mergekit_ext.events import Dispatcher, JsonLines, MergeEnd, ProgressBar, ShardWritten
from mergekit_ext.host import compat
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.host.out_config import agree
from mergekit_ext.host.session import Session
from mergekit_ext.host.staging import by_machine, resumable, shards, staged, written_in
from mergekit_ext.io.journal import Journal
from mergekit_ext.io.rooms import Room
from mergekit_ext.report.card import append_section
from mergekit_ext.report.merge_report import write_report

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
    """Yield the folder to merge into; then report, put it in its place, and tell who listens.

    Args:
        options: mergekit's; `quiet` switches the progress bar off.
        out_path: the folder that the output becomes.
        method: the method that reports; None for mergekit's own.
        callbacks: beside the progress bar and what the environment asks for.
        source: the text of the configuration.
        identity: whatever decides the output; with it the session has a journal, and what is
            finished is kept when the merge is stopped.
        restart: do not go on with what an earlier merge has left.
    """
    with _session(options, callbacks, out_path, source) as session:
        with compat.local_cards(), _folder(session, out_path, identity, restart) as folder:
            yield folder
            agree(folder)
            if method is not None:
                _describe(folder, method, session, options.random_seed or 0)
            ranks.current().wait()
        if not ranks.current().is_main:
            return
        for shard in shards(Path(out_path)):
            session.emit(ShardWritten(os.fspath(shard), shard.stat().st_size))
        session.emit(MergeEnd(out_path, time.perf_counter() - session.started))
        if method is not None:
            session.afterwards += method.warnings(session.records)
        session.warn(session.afterwards)


@contextmanager
def listening(
    options: MergeOptions, callbacks: Iterable[object], out_path: str = ""
) -> Iterator[Session]:
    """A session with the progress bar, `callbacks` and what the environment asks for."""
    with _session(options, callbacks, out_path, "") as session:
        yield session


@contextmanager
def _session(
    options: MergeOptions, callbacks: Iterable[object], out_path: str, source: str
) -> Iterator[Session]:
    listeners = _listeners(options, callbacks) if ranks.current().is_main else []
    session = Session(Dispatcher(listeners), out_path, source)
    session.quiet = options.quiet
    try:
        try:
            with sessions.active(session):
                yield session
        finally:
            session.close()
    except KeyboardInterrupt:
        if session.room is not None and session.room.exists() and ranks.current().is_main:
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
    """The folder to merge into; in other processes than the main one, one that is thrown away."""
    if identity is None:
        with staged(out_path) as folder:
            yield folder
        return
    together = ranks.current()
    try:
        with ExitStack() as stack:
            room = together.from_main(
                lambda: stack.enter_context(resumable(out_path, identity, restart))
            )
            _say_why(session, room)
            session.room, session.journal = room.path, Journal(room.path, together.rank)
            # Nobody adds a line before everybody has read the same ones.
            together.wait()
            if together.is_main:
                yield written_in(room.path, out_path)
            else:
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
                yield written_in(Path(scratch), out_path)
    except RankError as error:
        if not error.resumable or _KEPT in error.reason:
            raise
        raise RankError(error.rank, f"{error.reason}. {_left(session)}") from None
    except Exception as error:
        if isinstance(error, MergekitExtError) or not by_machine(error):
            raise
        raise StoppedError(f"{_reason(error, session)}. {_left(session)}") from error


def _reason(error: BaseException, session: Session) -> str:
    """What stopped a merge; of a full disk, which."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full and session.room is not None:
        return f"the disk of {session.room.parent} is full ({error}): free some space there"
    return f"{type(error).__name__}: {error}"


def _left(session: Session) -> str:
    """What a merge that was stopped has left, and what to do with it."""
    gone = session.room is not None and not session.room.exists()
    return _GONE if gone else _KEPT


def _say_why(session: Session, room: Room) -> None:
    if room.changed:
        session.say(f"Starting over: not what was merged before ({', '.join(room.changed)}).")


def _describe(folder: Path, method: ExtMethod, session: Session, seed: int) -> None:
    details = {record.name: record.details for record in session.records}
    write_report(folder, method.spec.name, details, seed)
    append_section(folder / "README.md", method.summary(session.records))
