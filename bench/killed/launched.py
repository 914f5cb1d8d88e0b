"""Merges by several processes that torchrun starts, one of which is killed.

As a program it is ``mergekit-ext``, which writes which process it is and counts its pieces.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.killed.cases import Case
from bench.killed.counting import count_pieces
from mergekit_ext.io.journal import Journal

_SLEEP = 0.005
_FOLDER = "BENCH_KILLED"


class Runner:
    """Runs one case by so many processes, counts its pieces in a folder, and chooses victims."""

    def __init__(self, case: Case, folder: Path, processes: int, chance: random.Random):
        self._case, self._folder = case, folder
        self._ranks, self._chance = range(processes), chance

    def run(self, out: Path, kill_after: float | None) -> tuple[bool, float]:
        """Merge into `out`; whether it came to its end, and the seconds.

        Seconds count from when all processes know what is finished until there is something at
        `out`: starting and ending take longer.
        """
        files = [self._folder / f"rank-{rank}" for rank in self._ranks]
        for file in files:
            file.unlink(missing_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(files)}"]
        merge = ["merge", str(self._case.config), str(out), *self._case.flags]
        running = subprocess.Popen(
            [sys.executable, *launcher, "-m", "bench.killed.launched", *merge],
            env={
                **os.environ,
                _FOLDER: str(self._folder),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while running.poll() is None and not all(file.exists() for file in files):
            time.sleep(_SLEEP)
        started = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            if running.poll() is None:
                os.kill(int(self._chance.choice(files).read_text()), signal.SIGKILL)
        while running.poll() is None and not out.exists():
            time.sleep(_SLEEP)
        seconds = time.monotonic() - started
        said = running.communicate()[1]
        if running.returncode and kill_after is None:
            raise SystemExit(f"{self._case.name} failed:\n{said[-3000:]}")
        return running.returncode == 0, seconds


def _merge_and_count(folder: Path) -> None:
    """Run the command; write this process's number when it knows what is finished already."""
    from mergekit_ext.cli import main

    count_pieces(folder)
    begin = Journal.__init__

    def begun(journal: Journal, place: Path, rank: int = 0, **named: Any) -> None:
        begin(journal, place, rank, **named)
        fresh = folder / f"new-{rank}"
        fresh.write_text(str(os.getpid()))
        fresh.rename(folder / f"rank-{rank}")

    Journal.__init__ = begun  # type: ignore[method-assign, assignment]
    main(prog_name="mergekit-ext")


if __name__ == "__main__":
    _merge_and_count(Path(os.environ[_FOLDER]))
