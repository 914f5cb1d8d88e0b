"""Ctrl-C ends a command within a second, whatever its threads are in the middle of.

Python sees a signal between two of its instructions: not while one call of a library decomposes a
large matrix, and at its end it waits for every thread of a pool. So a thread waits for the
signal, too, and ends the process if that still runs a moment later. When the interpreter shuts
down no such thread runs any more, and taking the libraries down can last seconds: that is left out.
As after a kill, nothing is left that looks whole, and a later process continues what is finished.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Seconds from the signal. What a command tidies up takes a few hundredths.
GRACE = 0.7
# As click has it for its `Aborted!`, and so mergekit's commands.
EXIT_ABORTED = 1

_watched = threading.Lock()


@contextmanager
def prompt() -> Iterator[None]:
    """Inside, and until the process has ended, Ctrl-C is obeyed within `GRACE` seconds.

    Libraries turn it into errors of their own, which leave as `KeyboardInterrupt` all the same.

    For commands: the process ends. Does nothing beside the main thread, where no signal arrives,
    and where the signal has another handler.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and _watched.acquire(blocking=False)
    )
    if not ours:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    unwound, pressed = threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        pressed.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    arguments = (reading, unwound)
    threading.Thread(target=_watch, args=arguments, name="mergekit-ext-ctrl-c", daemon=True).start()
    try:
        yield
    except BaseException:
        if not pressed.is_set():
            raise
        unwound.set()  # the watch goes on: threads may keep the process from its end
        atexit.register(_leave)  # the last one to come is the first to be called
        raise KeyboardInterrupt from None
    finally:
        if not unwound.is_set():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(before)
            os.close(writing)
            _watched.release()


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(EXIT_ABORTED)


def _watch(reading: int, unwound: threading.Event) -> None:
    while found := os.read(reading, 1):
        if found[0] == signal.SIGINT:
            time.sleep(GRACE)
            if not unwound.is_set():  # or the command has said it
                os.write(2, b"\nAborted!\n")
            os._exit(EXIT_ABORTED)
    os.close(reading)
