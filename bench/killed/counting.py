"""How many pieces of a merge are finished, also by processes that are killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mergekit_ext.io.journal import Journal

_PIECES = "pieces"


def count_pieces(folder: Path) -> None:
    """From now on, each line that this process adds to a journal is a byte in a file there."""
    counter = os.open(folder / _PIECES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    add = Journal.add

    def counted(journal: Journal, kind: str, key: str, value: Any) -> None:
        add(journal, kind, key, value)
        os.write(counter, b".")

    Journal.add = counted  # type: ignore[method-assign, assignment]


def counted(folder: Path) -> int:
    """How many there were since the last call."""
    path = folder / _PIECES
    count = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    return count
