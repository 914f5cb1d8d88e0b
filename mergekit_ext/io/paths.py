"""Questions about paths that somebody wrote, which may be no paths at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is something."""
    return _answer(Path.exists, path)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder."""
    return _answer(Path.is_dir, path)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file."""
    return _answer(Path.is_file, path)


def _answer(question: Callable[[Path], bool], path: str | os.PathLike[str]) -> bool:
    try:
        return question(Path(path))
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
        return False


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home that ``~`` stands for; as it is if nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
