"""Hidden folders that outputs are written in, and what killed processes have left of them."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_ext.errors import ConfigError, Problem

_LOCK = ".lock"
_IDENTITY = "identity.json"
_UNKNOWN = ("",)
_SUFFIX = "-incomplete"
_LONGEST_NAME = 4096


@dataclass(frozen=True)
class Room:
    """A hidden folder to write in.

    Attributes:
        path: the folder.
        taken_over: whether an earlier process with the same identity has worked in it.
        changed: otherwise, in which parts of their identities what was left of an earlier
            process differs; empty if nothing was left.
    """

    path: Path
    taken_over: bool = False
    changed: tuple[str, ...] = ()


@contextmanager
def hidden_room(target: Path, beside: Path) -> Iterator[Path]:
    """Yield a new folder in `beside` for what will become `target`; remove it at the end.

    A process that is killed cannot remove its folder: it is locked while it is in use, and those
    of earlier runs with the same target that nobody holds go when the next one starts. The lock
    may not be seen from other machines, so their folders, which bear their names, are left alone.

    Raises:
        ConfigError: another process of this machine is writing what will become `target`.
    """
    with _one_at_a_time(beside):
        for left, lock in _left(target, beside):
            _remove(left, lock)
        room, lock = _new(target, beside)
    try:
        yield room
    finally:
        _remove(room, lock)


@contextmanager
def lasting_room(
    target: Path,
    beside: Path,
    identity: Mapping[str, str],
    keeps: Callable[[BaseException], bool],
    restart: bool = False,
) -> Iterator[Room]:
    """Like `hidden_room`, but a process with the same identity goes on in what another has left.

    Args:
        target: what the folder will become.
        beside: where it is made.
        identity: whatever decides the output, by names that a user understands.
        keeps: whether the folder stays after an error, for the next one to go on in.
        restart: remove what is left, whatever its identity.

    Raises:
        ConfigError: another process of this machine is writing what will become `target`.
    """
    taken: tuple[Path, int] | None = None
    changed: tuple[str, ...] = ()
    with _one_at_a_time(beside):
        for left, lock in _left(target, beside):
            differs = _differences(left, identity)
            if taken is None and not (differs or restart) and left.parent == beside:
                taken = left, lock
            else:
                changed = changed or (() if differs == _UNKNOWN else differs)
                _remove(left, lock)
        room, lock = taken or _new(target, beside)
    try:
        if taken is None:
            (room / _IDENTITY).write_text(json.dumps(dict(identity)), encoding="utf-8")
        yield Room(room, taken is not None, () if taken or restart else changed)
    except BaseException as error:
        if keeps(error):
            os.close(lock)
        else:
            _remove(room, lock)
        raise
    _remove(room, lock)


def left_bytes(target: Path, beside: Path) -> int:
    """What earlier processes have left takes on the disk; it is gone on with, or removed."""
    return sum(
        getattr(file.lstat(), "st_blocks", 0) * 512
        for room in beside.glob(f"{glob.escape(_prefix(target))}*{_SUFFIX}")
        for file in room.rglob("*")
    )


def is_room(path: Path) -> bool:
    """Whether a folder is called as the hidden ones are."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def _prefix(target: Path) -> str:
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    # Names end at 255 bytes on most file systems; the output's may be as long as that.
    return f".{target.name[:40]}-{host[:40]}-"


def _new(target: Path, beside: Path) -> tuple[Path, int]:
    room = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=_SUFFIX, dir=beside))
    lock = os.open(room / "new", os.O_RDWR | os.O_CREAT, 0o600)
    _locked(lock)
    os.write(lock, os.fsencode(target.name))
    # Only now: another process that found the file first would take the room for a left one.
    (room / "new").rename(room / _LOCK)
    return room, lock


def _left(target: Path, beside: Path) -> list[tuple[Path, int]]:
    """The folders of earlier runs that nobody holds, locked."""
    found = []
    for place in sorted({beside, target.parent}):
        for room in sorted(place.glob(f"{glob.escape(_prefix(target))}*{_SUFFIX}")):
            try:
                lock = os.open(room / _LOCK, os.O_RDWR)
            except OSError:  # somebody else's, or so new that it has no lock yet
                continue
            # Names are cut in the room's: the lock has the whole of it.
            if os.read(lock, _LONGEST_NAME) != os.fsencode(target.name):
                os.close(lock)
            elif _locked(lock):
                if _same(lock, room / _LOCK):
                    found.append((room, lock))
                else:
                    os.close(lock)
            else:
                for _, held in [("", lock), *found]:
                    os.close(held)
                raise ConfigError([_in_use(target, room)])
    return found


def _in_use(target: Path, room: Path) -> Problem:
    return Problem(
        os.fspath(target),
        f"another process that is writing it, in {room}",
        "a place that nobody else writes to",
        "Wait for that process or stop it, or choose another name.",
    )


@contextmanager
def _one_at_a_time(beside: Path) -> Iterator[None]:
    """Inside, no other process looks for rooms in `beside`: of two that start, one is the first."""
    folder = None
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):  # network file systems may lock files only
            folder = os.open(beside, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _same(lock: int, path: Path) -> bool:
    """Whether the file has not been removed, by whoever held it, before it was locked here."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except OSError:
        return False


def _remove(room: Path, lock: int) -> None:
    shutil.rmtree(room, ignore_errors=True)
    os.close(lock)


def _differences(room: Path, identity: Mapping[str, str]) -> tuple[str, ...]:
    try:
        found = json.loads((room / _IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):  # of something that cannot go on, or killed at once
        return _UNKNOWN
    return tuple(key for key in {**identity, **found} if found.get(key) != identity.get(key))


def _locked(lock: int) -> bool:
    """Take a lock that ends with the process; False if it is held, or there are none here."""
    if sys.platform == "win32":  # without such locks what is left stays
        return False
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
