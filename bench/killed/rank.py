"""``mergekit-ext`` that says which process it is, and counts its pieces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.killed.counting import count_pieces
from mergekit_ext.io.journal import Journal

FOLDER = "BENCH_KILLED"


def process_file(folder: Path, rank: int) -> Path:
    """Where a rank's process number is when it has begun to merge."""
    return folder / f"rank-{rank}"


if __name__ == "__main__":
    from mergekit_ext.cli import main

    folder = Path(os.environ[FOLDER])
    count_pieces(folder)
    begin = Journal.__init__

    def begun(journal: Journal, place: Path, rank: int = 0, **named: Any) -> None:
        begin(journal, place, rank, **named)
        fresh = folder / f"new-{rank}"
        fresh.write_text(str(os.getpid()))
        fresh.rename(process_file(folder, rank))

    Journal.__init__ = begun  # type: ignore[method-assign, assignment]
    main(prog_name="mergekit-ext")
