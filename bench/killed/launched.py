"""Merges by several processes that torchrun starts, one of which is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.killed.cases import Case
from bench.killed.rank import FOLDER, process_file

_SLEEP = 0.005


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
        files = [process_file(self._folder, rank) for rank in self._ranks]
        for file in files:
            file.unlink(missing_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(files)}"]
        merge = ["merge", str(self._case.config), str(out), *self._case.flags]
        running = subprocess.Popen(
            [sys.executable, *launcher, "-m", "bench.killed.rank", *merge],
            env={
                **os.environ,
                FOLDER: str(self._folder),
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
