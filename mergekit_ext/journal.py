"""Which pieces of an output are finished, so that a killed merge goes on where it was.

Each process appends lines to a file of its own: for each piece the CRC-32 of what follows, in eight
hexadecimal digits, a space, and a JSON list, written only when the piece's bytes are. A line that a
kill has cut short, or that the disk has changed, does not count.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_FILES = "journal-*.lines"
# Bytes before the JSON of a line.
_SUM = 9


class Journal:
    """The finished pieces of one output.

    Attributes:
        finished: what earlier runs have written, by kind and key. Nothing of this run.
    """

    def __init__(self, folder: Path, rank: int = 0):
        """Read what there is in `folder`; go on in the file of `rank`."""
        self.finished: Mapping[tuple[str, str], Any] = _read(folder)
        self._path = folder / f"journal-{rank}.lines"
        self._file: int | None = None

    def add(self, kind: str, key: str, value: Any) -> None:
        """Note a finished piece.

        Args:
            kind: what sort of piece: ``tensor``, ``block``, ``norms``, ...
            key: which one; a later line of the same kind and key counts.
            value: anything that JSON can say; floats come back exactly.
        """
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            _drop_torn_line(self._file)
        content = json.dumps([kind, key, value], separators=(",", ":")).encode()
        data = _sum(content) + content + b"\n"
        done = 0
        while done < len(data):
            done += os.write(self._file, data[done:])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _read(folder: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for path in sorted(folder.glob(_FILES)):
        for line in path.read_bytes().split(b"\n")[:-1]:
            # After a power cut there may be anything: what is not noted is made again.
            content = line[_SUM:]
            with suppress(ValueError, RecursionError):
                if _sum(content) == line[:_SUM] and _is_entry(entry := json.loads(content)):
                    found[entry[0], entry[1]] = entry[2]
    return found


def _sum(content: bytes) -> bytes:
    return b"%08x " % zlib.crc32(content)


def _is_entry(value: Any) -> bool:
    sound = isinstance(value, list) and len(value) == 3
    return sound and all(isinstance(name, str) for name in value[:2])


def _drop_torn_line(file: int) -> None:
    size = os.lseek(file, 0, os.SEEK_END)
    while size and os.pread(file, 1, size - 1) != b"\n":
        size -= 1
    os.ftruncate(file, size)
    os.lseek(file, 0, os.SEEK_END)
