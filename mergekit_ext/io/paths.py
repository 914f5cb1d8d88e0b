"""Questions about texts that should be paths, and may be none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether there is something."""
    return _answer(Path.exists, path)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a folder."""
    return _answer(Path.is_dir, path)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file."""
    return _answer(Path.is_file, path)


def _answer(question: Callable[[Path], bool], path: str | os.PathLike[str]) -> bool:
    try:
        return question(Path(path))
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
        return False


def may_be_hub_name(name: Any) -> bool:
    """Whether a name that is no path may be that of a repository on the Hugging Face Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return the path with the home that ``~`` stands for; as it is if no user has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
