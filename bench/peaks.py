"""What a function holds at once: memory, open files, in a process of its own.

Each runs in a fork of this process, which has imported everything: no start is paid twice, and
what one leaves behind is not counted to the next.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mergekit_ext.core.memory import held

_EVERY = 0.002


@dataclass(frozen=True)
class Peaks:
    """What was seen of one run.

    Attributes:
        before: anonymous memory at its start, in bytes.
        third: the most in the first third of the time.
        most: the most of all.
        files: the most open files.
        seconds: how long it ran.
        code: its exit code.
    """

    before: int
    third: int
    most: int
    files: int
    seconds: float
    code: int

    @property
    def added(self) -> int:
        """The most, beyond what there was before."""
        return self.most - self.before


def measured(function: Callable[[], object]) -> Peaks:
    """Run `function` in a fork; an exception is exit code 1, with its traceback."""
    give_back()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, json.dumps(asdict(_watched(function))).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return Peaks(**json.loads(found))


def give_back() -> None:
    """What the allocator keeps of earlier work would be used again, and not be seen."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _watched(function: Callable[[], object]) -> Peaks:
    before, started = held(), time.perf_counter()
    seen: list[tuple[float, int, int]] = [(0.0, before, 0)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_EVERY):
            files = len(list(Path("/proc/self/fd").iterdir()))
            seen.append((time.perf_counter() - started, held(), files))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = 0
    try:
        function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        code = 1
    over.set()
    watcher.join()
    seconds = time.perf_counter() - started
    third = [memory for at, memory, _ in seen if at <= seconds / 3]
    return Peaks(
        before,
        max(third),
        max(memory for _, memory, _ in seen),
        max(files for _, _, files in seen),
        seconds,
        code,
    )
