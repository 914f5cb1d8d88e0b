"""What has to be on the disk before a name says that it is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Of file systems that cannot be asked.
_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


def flush(folder: Path) -> None:
    """Wait until every file below `folder` is on the disk, and the folders that name them.

    Without it the system may write a new name before the bytes: after a power cut a file would
    have its length and hold zeros.

    Raises:
        OSError: the disk does not take them; it is full, or broken.
    """
    done: set[tuple[int, int]] = set()
    for place, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(place, name) for name in names), Path(place)):
            if not path.is_symlink():
                _flush(path, done)


def flush_entries(folder: Path) -> None:
    """Wait until the disk knows what `folder` has been given or has lost.

    Raises:
        OSError: the disk is full, or broken.
    """
    _flush(folder, set())


def appear(folder: Path, target: Path) -> None:
    """Give a finished folder its name, when the disk has all that is in it.

    Raises:
        OSError: the disk is full, or broken; or there is something at `target`.
    """
    flush(folder)
    folder.rename(target)
    flush_entries(target.parent)


def _flush(path: Path, done: set[tuple[int, int]]) -> None:
    if os.name == "nt" and path.is_dir():  # folders are not opened there
        return
    # Writable where that is asked for: Windows flushes no others.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        state = os.fstat(descriptor)
        if (state.st_dev, state.st_ino) not in done:
            done.add((state.st_dev, state.st_ino))
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)
