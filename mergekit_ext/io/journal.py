"""The journal of an output: which of its pieces are finished, for a run that goes on with it."""

import json
import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_JOURNAL = re.compile(r"journal-([0-9]+)-([0-9]+)\.lines")
_SUM = 9  # bytes before the JSON of a line


class Journal:
    """The finished pieces of one output; `finished` has those of earlier runs, by kind and key.

    Each process of each run appends lines to a file of its own: for each piece the CRC-32 of what
    follows, in eight hexadecimal digits, a space, and a JSON list, written only when the piece's
    bytes are. A line that a kill has cut short, or that the disk has changed, does not count. All
    processes of a run make their journals before one of them adds a line.
    """

    def __init__(self, folder: Path, rank: int = 0):
        names = [(_JOURNAL.fullmatch(path.name), path) for path in folder.iterdir()]
        earlier = sorted((int(m[1]), int(m[2]), path) for m, path in names if m)
        self.finished: dict[tuple[str, str], Any] = {}
        for _, _, path in earlier:
            self.finished |= _lines(path)
        run = earlier[-1][0] + 1 if earlier else 1
        self._path = folder / f"journal-{run}-{rank}.lines"
        self._file: int | None = None

    def add(self, kind: str, key: str, value: Any) -> None:
        """Record the JSON value of a finished piece: of one kind and key the last line counts."""
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        content = json.dumps([kind, key, value], separators=(",", ":")).encode()
        data = _sum(content) + content + b"\n"
        done = 0
        while done < len(data):
            done += os.write(self._file, data[done:])

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Finished:
    """What earlier runs have finished of one subject, and what this run adds.

    The subject is a digest of everything that the values and their form depend on.
    """

    def __init__(self, journal: Journal | None = None, subject: str = ""):
        self._journal, self._subject = journal, subject

    def found(self, kind: str, key: str) -> Any:
        """Return what an earlier run recorded of this subject, or None."""
        match self._journal and self._journal.finished.get((kind, key)):
            case [subject, value] if subject == self._subject:
                return value
        return None

    def add(self, kind: str, key: str, value: Any) -> None:
        if self._journal is not None:
            self._journal.add(kind, key, [self._subject, value])

    def get(self, kind: str, key: str, make: Callable[[], Any]) -> Any:
        """Return what an earlier run recorded, or what `make` returns, which is recorded."""
        value = self.found(kind, key)
        if value is None:
            value = make()
            self.add(kind, key, value)
        return value


def _lines(path: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        content = line[_SUM:]
        with suppress(ValueError, RecursionError):
            if _sum(content) == line[:_SUM]:
                match json.loads(content):
                    case [str(kind), str(key), value]:
                        found[kind, key] = value
    return found


def _sum(content: bytes) -> bytes:
    return b"%08x " % zlib.crc32(content)
