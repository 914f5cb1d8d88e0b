"""Commands that get Ctrl-C at a moment of their run: how long they take to end, and how."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LONGEST = 60.0


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        seconds: from the signal; from the start without one.
        code: its exit code; that of a signal is negative.
        said: what it wrote to standard error.
    """

    seconds: float
    code: int
    said: str


def run(command: Callable[[], object], after: float | None, log: Path) -> End:
    """Run `command` in a fork, which ends as Python does; send SIGINT `after` seconds.

    Args:
        command: one of click's, which exits by itself.
        after: None to let it run.
        log: where its standard error goes.
    """
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _become(command, log)
    if after is not None:
        time.sleep(after)
        started = time.perf_counter()
        os.kill(child, signal.SIGINT)
    alarm = threading.Timer(_LONGEST, os.kill, (child, signal.SIGKILL))
    alarm.start()
    _, status = os.waitpid(child, 0)
    alarm.cancel()
    seconds = time.perf_counter() - started
    return End(seconds, os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))


def _become(command: Callable[[], object], log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    # What the interpreter waits for at its end: the threads of every pool.
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stderr.flush()
    os._exit(code)
