"""Hidden folders that outputs are written in, and what killed processes have left of them."""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"


@contextmanager
def hidden_room(target: Path, beside: Path) -> Iterator[Path]:
    """Yield a new folder in `beside` for what will become `target`; remove it at the end.

    A process that is killed cannot remove its folder: it is locked while it is in use, and those
    of earlier runs with the same target that nobody holds go when the next one starts. The lock
    may not be seen from other machines, so their folders, which bear their names, are left alone.
    """
    prefix = _prefix(target)
    for place in {beside, target.parent}:
        for left in place.glob(f"{glob.escape(prefix)}*-incomplete"):
            _remove_if_left(left)
    room = Path(tempfile.mkdtemp(prefix=prefix, suffix="-incomplete", dir=beside))
    lock = os.open(room / "new", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _locked(lock)
        # Only now: another process that found the file first would take the room for a left one.
        (room / "new").rename(room / _LOCK)
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)
        os.close(lock)


def _prefix(target: Path) -> str:
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    # Names end at 255 bytes on most file systems; the output's may be as long as that.
    return f".{target.name[:40]}-{host[:40]}-"


def _remove_if_left(room: Path) -> None:
    try:
        lock = os.open(room / _LOCK, os.O_RDWR)
    except OSError:  # somebody else's, or so new that it has no lock yet
        return
    try:
        if _locked(lock):
            shutil.rmtree(room, ignore_errors=True)
    finally:
        os.close(lock)


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
