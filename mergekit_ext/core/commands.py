"""Commands: what both packages share; and Ctrl-C ends them within a second.

Python sees a signal between two of its instructions only, and waits at its end for every thread
of a pool. So a thread waits for the signal too, and ends the process if that still runs a moment
later. As after a kill, nothing is left that looks whole, and a later process goes on.
"""

import atexit
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from mergekit_ext.errors import MergekitExtError, MergeWarning, nearest, printable

GRACE = 0.7  # seconds from the signal; what a command tidies up takes a few hundredths
EXIT_ABORTED = 1  # as click has it for its `Aborted!`, and so mergekit's commands
_LONGEST_WARNING = 10_000


class CommandError(click.ClickException):
    """An error that a command prints in place of a traceback."""

    exit_code = 2  # as for click's own usage errors: the input is at fault


def searching(command: Any) -> Any:
    """Add the options of a search to a command."""
    for option in (
        click.option("--evaluate", metavar="MODULE:FUNCTION", required=True, help="Scores a model"),
        click.option("--trials", type=click.IntRange(1), default=30, show_default=True),
        click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Of the search"),
        click.option("--task", "tasks", multiple=True, help="For FUNCTION (default: the inputs)"),
    ):
        command = option(command)
    return command


def ending(out: object, seconds: float, following: str, what: str = "") -> str:
    """Return what a command ends with: where its output is, what it is, and what comes next."""
    return f"Written: {out}, in {seconds:.1f} s{what and f' ({what})'}.\nNext: {following}"


def pushing(command: Any) -> Any:
    """Add the options of an upload to a command."""
    for option in (
        click.option("--public", "private", flag_value=False, default=True, help="Let all read it"),
        click.option("--push-to-hub", metavar="NAME", help="Upload to this repository (private)"),
    ):
        command = option(command)
    return command


class Commands(click.Group):
    """A group that names the nearest command, and refuses an option with one value given twice."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and (near := nearest(args[0], known)):
            ctx.fail(f"No such command '{args[0]}'. Write `{near}`.")
        name, command, rest = super().resolve_command(ctx, args)
        assert command is not None
        within = click.Context(command, parent=ctx, info_name=name)
        given: Any = Counter(command.make_parser(within).parse_args([*rest])[2])
        for option, times in given.items():
            if times > 1 and not (option.multiple or option.count or option.is_flag):
                raise click.UsageError(
                    f"{option.opts[0]}: given {times} times; once is all.", within
                )
        return name, command, rest


@contextmanager
def reporting() -> Iterator[Callable[[object, str], None]]:
    """Print warnings and errors of ours as lines; yield what prints the command's `ending`."""
    shown, started = warnings.showwarning, time.perf_counter()

    def done(out: object, following: str) -> None:
        click.echo(ending(out, time.perf_counter() - started, following), err=True)

    def show(message: Any, category: Any, *rest: Any, **options: Any) -> None:
        if issubclass(category, MergeWarning):
            click.echo(f"Warning: {printable(str(message), _LONGEST_WARNING)}", err=True)
        else:
            shown(message, category, *rest, **options)

    warnings.showwarning = show
    try:
        with prompt():
            yield done
    except MergekitExtError as error:
        raise CommandError(str(error)) from None
    finally:
        sys.stderr.flush()
        warnings.showwarning = shown


@contextmanager
def prompt() -> Iterator[None]:
    """Obey Ctrl-C within `GRACE` seconds, inside and until the process has ended.

    Libraries turn it into errors of their own, which leave as `KeyboardInterrupt` all the same.
    Nothing changes beside the main thread, and where the signal has another handler.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
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
    threading.Thread(target=_watch, args=(reading, unwound), daemon=True).start()
    try:
        yield
    except BaseException:
        if not pressed.is_set():
            raise
        unwound.set()  # the watch goes on: threads may keep the process from its end
        atexit.register(leave, EXIT_ABORTED)  # the last one to come is the first to be called
        raise KeyboardInterrupt from None
    finally:
        if not unwound.is_set():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(before)
            os.close(writing)


def leave(code: int) -> None:
    """End the process at once, without a shutdown of the interpreter."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(code)


def _watch(reading: int, unwound: threading.Event) -> None:
    while found := os.read(reading, 1):
        if found[0] == signal.SIGINT:
            time.sleep(GRACE)
            if not unwound.is_set():  # or the command has said it
                os.write(2, b"\nAborted!\n")
            os._exit(EXIT_ABORTED)
    os.close(reading)
