"""Merges in forked children, which are killed after some seconds."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from pathlib import Path

from bench.killed.cases import Case
from bench.killed.counting import count_pieces
from mergekit_ext.kernels import threads


class Runner:
    """Runs one case, and counts its pieces in a folder."""

    def __init__(self, case: Case, folder: Path):
        self._case, self._folder = case, folder
        case.merge(folder / "first" / "out")  # which loads what is loaded late

    def run(self, out: Path, kill_after: float | None) -> tuple[bool, float]:
        """Merge into `out`; whether it came to its end, and the seconds."""
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            self._merge(out)
        killer = threading.Timer(kill_after or 0, os.kill, (child, signal.SIGKILL))
        if kill_after is not None:
            killer.start()
        # Not yet taken away, a child that has ended keeps its number: no other process is killed.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        seconds = time.monotonic() - started
        killer.cancel()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"{self._case.name} failed: {code}")
        return code == 0, seconds

    def _merge(self, out: Path) -> None:
        try:
            threads._pool.cache_clear()  # a child has no threads
            count_pieces(self._folder)
            self._case.merge(out)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
