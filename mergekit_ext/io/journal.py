"""Which pieces of an output are finished, so that a killed merge goes on where it was.

Each process of each run appends lines to a file of its own: for each piece the CRC-32 of what
follows, in eight hexadecimal digits, a space, and a JSON list, written only when the piece's bytes
are. A line that a kill has cut short, or that the disk has changed, does not count.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_FILE = re.compile(r"journal-([0-9]+)-([0-9]+)\.lines")
# Bytes before the JSON of a line.
_SUM = 9


class Journal:
    """The finished pieces of one output.

    All processes of a run open theirs before one of them adds a line.

    Attributes:
        finished: what earlier runs have written, by kind and key. Nothing of this run.
    """

    def __init__(self, folder: Path, rank: int = 0):
        """Read what there is in `folder`; begin the file of `rank` in a new run."""
        earlier = _files(folder)
        self.finished: Mapping[tuple[str, str], Any] = _read(earlier.values())
        run = max((run for run, _ in earlier), default=0) + 1
        self._path = folder / f"journal-{run}-{rank}.lines"
        self._file: int | None = None

    def add(self, kind: str, key: str, value: Any) -> None:
        """Note a finished piece.

        Args:
            kind: what sort of piece: ``tensor``, ``block``, ``norms``, ...
            key: which one; a later line of the same kind and key counts, and one of a later run.
            value: anything that JSON can say; floats come back exactly.
        """
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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


class Finished:
    """What earlier runs have finished of one subject, and what this run adds.

    Lines of other subjects in the same journal are passed over.

    Args:
        journal: None to find and to keep nothing.
        subject: a digest of everything that the values and their form depend on.
    """

    def __init__(self, journal: Journal | None = None, subject: str = ""):
        self._journal, self._subject = journal, subject

    def found(self, kind: str, key: str) -> Any:
        """Return what an earlier run recorded of this subject, or None."""
        line = self._journal.finished.get((kind, key)) if self._journal is not None else None
        if isinstance(line, list) and len(line) == 2 and line[0] == self._subject:
            return line[1]
        return None

    def add(self, kind: str, key: str, value: Any) -> None:
        """Record a finished piece; see `Journal.add`."""
        if self._journal is not None:
            self._journal.add(kind, key, [self._subject, value])

    def get(self, kind: str, key: str, make: Callable[[], Any]) -> Any:
        """Return what an earlier run recorded, or what `make` returns, which is recorded."""
        value = self.found(kind, key)
        if value is None:
            value = make()
            self.add(kind, key, value)
        return value


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """The files of earlier runs by run and rank, in this order."""
    found = [(_FILE.fullmatch(path.name), path) for path in folder.iterdir()]
    return dict(sorted(((int(m[1]), int(m[2])), path) for m, path in found if m))


def _read(files: Iterable[Path]) -> dict[tuple[str, str], Any]:
    found = {}
    for path in files:
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
