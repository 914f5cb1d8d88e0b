"""Hidden folders that outputs are written in, and what killed processes have left of them."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
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
# Links are not followed, and nobody is waited for at the other end of a pipe.
_NO_TRAPS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_PATIENCE = 5.0  # seconds
# Of characters: some hundred for each input.
_LARGEST_IDENTITY = 1 << 24


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
                continue
            if left.parent != beside:
                differs = ("a folder at the output's place",)
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
    found = 0
    for room, lock in _rooms(target, beside):
        os.close(lock)
        found += sum(getattr(file.lstat(), "st_blocks", 0) * 512 for file in room.rglob("*"))
    return found


def is_room(path: Path) -> bool:
    """Whether a folder is called as the hidden ones are."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def _prefix(target: Path) -> str:
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    # Names end at 255 bytes on most file systems; the output's may be as long as that.
    return f".{target.name[:40]}-{host[:40]}-"


def _new(target: Path, beside: Path) -> tuple[Path, int]:
    room = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=_SUFFIX, dir=beside))
    lock = os.open(room / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    _locked(lock)
    os.write(lock, _way(target, room))
    # Only now: another process that found the file first would take the room for a left one.
    (room / "new").rename(room / _LOCK)
    return room, lock


def _way(target: Path, room: Path) -> bytes:
    """What the lock of a room says of its target; it holds where folders above are renamed."""
    return os.fsencode(os.path.relpath(target, room.parent))


def _rooms(target: Path, place: Path) -> Iterator[tuple[Path, int]]:
    """The rooms in `place` for `target`, whoever holds them, with their locks, open."""
    for room in sorted(place.glob(f"{glob.escape(_prefix(target))}*{_SUFFIX}")):
        if (lock := _opened(target, room)) is not None:
            yield room, lock


def _opened(target: Path, room: Path) -> int | None:
    """The lock of a room; None if it is none of ours, or not for `target`.

    Names are cut in the room's, so the lock has the whole of it. Others may write to the place,
    too: what they have put there is not followed, waited for or taken.
    """
    try:
        # A room that is so new that it has no lock yet is passed over, too.
        lock = os.open(room / _LOCK, os.O_RDWR | _NO_TRAPS)
    except OSError:
        return None
    file, folder = os.fstat(lock), room.lstat()
    kinds = stat.S_ISREG(file.st_mode) and stat.S_ISDIR(folder.st_mode)
    if (
        kinds
        and _is_own(file)
        and _is_own(folder)
        and os.read(lock, _LONGEST_NAME) == _way(target, room)
    ):
        return lock
    os.close(lock)
    return None


def _is_own(state: os.stat_result) -> bool:
    return sys.platform == "win32" or state.st_uid == os.getuid()


def _left(target: Path, beside: Path) -> list[tuple[Path, int]]:
    """The rooms of earlier runs that nobody holds, locked."""
    found: list[tuple[Path, int]] = []
    for place in sorted({beside, target.parent}):
        for room, lock in _rooms(target, place):
            taken = _locked(lock)
            if taken is False:
                for _, held in [*found, (room, lock)]:
                    os.close(held)
                raise ConfigError([_in_use(target, room)])
            if taken and _same(lock, room / _LOCK):
                found.append((room, lock))
            else:
                os.close(lock)
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
    """Inside, no other process looks for rooms in `beside`: of two that start, one is the first.

    Somebody else may hold the folder for reasons of their own: after some seconds we go on.
    """
    folder = None
    if sys.platform != "win32":
        with suppress(OSError):  # who may write there, but not read
            folder = os.open(beside, os.O_RDONLY)
    try:
        if folder is not None:
            until = time.monotonic() + _PATIENCE
            while _locked(folder) is False and time.monotonic() < until:
                time.sleep(0.02)
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
    """Remove a room, its lock last: what a kill leaves of it is still known, and removed."""
    try:
        for path in room.iterdir() if room.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:  # which `rmtree` would open, and wait at a pipe
                with suppress(OSError):
                    path.unlink()
        if sys.platform != "win32":  # where open files are not removed
            shutil.rmtree(room, ignore_errors=True)
    finally:
        os.close(lock)
    if sys.platform == "win32":
        shutil.rmtree(room, ignore_errors=True)


def _differences(room: Path, identity: Mapping[str, str]) -> tuple[str, ...]:
    try:
        descriptor = os.open(room / _IDENTITY, os.O_RDONLY | _NO_TRAPS)
        with os.fdopen(descriptor, encoding="utf-8") as file:
            found = json.loads(file.read(_LARGEST_IDENTITY))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):  # of something that cannot go on, or killed at once
        return _UNKNOWN
    return tuple(key for key in {**identity, **found} if found.get(key) != identity.get(key))


def _locked(lock: int) -> bool | None:
    """Take a lock that ends with the process: False if it is held, None if there are none here."""
    if sys.platform == "win32":  # what is left stays
        return None
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True
