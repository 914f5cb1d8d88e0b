"""Things that stand where a file should: folders, pipes, devices, links, what may not be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _loop(path: Path) -> None:
    other = path.with_name("other-end")
    other.symlink_to(path.name)
    path.symlink_to(other.name)


def _endless(path: Path) -> None:
    """A file of a terabyte, of which nothing is stored."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


PLACES: dict[str, Callable[[Path], None]] = {
    "a folder": _folder,
    "a pipe": _pipe,
    "an endless device": _to("/dev/zero"),
    "an empty device": _to("/dev/null"),
    "a terminal": _to("/dev/tty"),
    "a link to itself": _loop,
    "a broken link": _to("nowhere"),
    "a terabyte": _endless,
}
