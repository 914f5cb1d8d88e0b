"""What ``accelerate launch`` and torchrun say of the processes that they have started."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from mergekit_ext import ranks
from mergekit_ext.errors import ConfigError, Problem, RankError
from mergekit_ext.processes import Processes
from mergekit_ext.ranks import Ranks

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE."
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_MOST, _LAST_PORT = 1 << 20, 65_535
_MEETING = timedelta(minutes=5)
_ENDED = "the launcher ended it (SIGTERM), as it does when another process dies"


def launched_size() -> int:
    """How many processes a launcher has started, this one among them; 1 without a launcher.

    Raises:
        ConfigError: the variables of the launcher are not what they should be.
    """
    found = os.environ.get("WORLD_SIZE", "1")
    if not _is_number(found, 1, _MOST):
        raise ConfigError([Problem("WORLD_SIZE", repr(found), "a number of processes", _REMEDY)])
    size = int(found)
    if size == 1:
        return size
    if missing := [name for name in _NEEDED if name not in os.environ]:
        named = f"WORLD_SIZE={found} without {', '.join(missing)}"
        raise ConfigError([Problem("environment", named, "all of them", _REMEDY)])
    if problems := list(_wrong(size)):
        raise ConfigError(problems)
    return size


def _wrong(size: int) -> Iterator[Problem]:
    for name, first, last in (
        ("RANK", 0, size - 1),
        ("LOCAL_RANK", 0, size - 1),
        ("MASTER_PORT", 1, _LAST_PORT),
    ):
        if not _is_number(found := os.environ[name], first, last):
            expected = f"a number from {first} to {last}"
            yield Problem(name, repr(found), expected, _REMEDY)
    if not os.environ["MASTER_ADDR"].strip():
        yield Problem("MASTER_ADDR", "nothing", "the main process's machine", _REMEDY)


def _is_number(text: str, first: int, last: int) -> bool:
    """Whether it is one, written as launchers do: as text, 00 would be another than 0."""
    return bool(_NUMBER.fullmatch(text)) and first <= int(text) <= last


def require_one(command: str) -> bool:
    """Refuse several processes for a command that does not share its work out.

    Returns:
        whether to go on: no process but the first has anything to do or say.

    Raises:
        ConfigError: in the first process, if there are others.
    """
    size = launched_size()
    if size == 1 or ranks.current().size > 1:
        return True
    if is_first():
        remedy = (
            "Start it alone, or merge with several: torchrun --nproc_per_node N -m mergekit_ext "
            "merge CONFIG OUT."
        )
        found = f"{size} processes for {command}"
        raise ConfigError([Problem("WORLD_SIZE", found, "one process", remedy)], "this command")
    return False


def is_first() -> bool:
    """Whether this process is the one of all launched ones that speaks for them."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def launched() -> Iterator[Ranks]:
    """Inside, this process works with the others that were launched; all end together.

    An error of one stops the others with a `RankError`. Without a launcher, or with one process,
    nothing changes.

    Raises:
        ConfigError: the variables of the launcher are not what they should be.
        RankError: another process has stopped, or the launcher wants this one to.
    """
    if launched_size() == 1:
        yield ranks.current()
        return
    with _group() as processes, _stopped_by_signal(processes), ranks.joined(processes):
        processes.open()
        try:
            yield processes
        except BaseException as error:
            # The launcher ends all when the first has gone; this one has its reason to tell.
            _ignore_signal()
            with suppress(RankError):
                processes.close(error)
            raise
        processes.close()


def own_device(device: str) -> str:
    """The device of this process, for ``cuda`` or another kind of which each takes its own.

    It becomes the kind's current device. A kind that is not here stays as it is.
    """
    import torch

    if device == "cpu":
        return device
    kind = getattr(torch, device, None)
    if kind is None or not kind.device_count():
        return device
    number = int(os.environ["LOCAL_RANK"]) % kind.device_count()
    kind.set_device(number)
    return f"{device}:{number}"


@contextmanager
def _group() -> Iterator[Processes]:
    import torch.distributed as distributed
    from accelerate.state import PartialState

    try:
        found, rank, size = next(distributed.rendezvous("env://", timeout=_MEETING))
        # A launcher that starts all processes again may keep the store of those that failed.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"mergekit_ext/{attempt}", found)
        # Small Python objects are all that is sent: gloo does it for processes with GPUs as well.
        state = PartialState(cpu=True, backend="gloo", store=store, timeout=_MEETING)
    except (RuntimeError, ValueError, TypeError) as error:  # of torch.distributed; of variables
        raise ConfigError([_not_met(error)]) from None
    try:
        yield Processes(distributed.PrefixStore("merge", store), rank, size)
    finally:
        state.destroy_process_group()
        state._reset_state()


def _not_met(error: Exception) -> Problem:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    remedy = (
        "Check that all were started, that they reach this address, and, with several network "
        "interfaces, that GLOO_SOCKET_IFNAME names the right one."
    )
    reason = str(error).partition("\n")[0]
    return Problem(f"MASTER_ADDR, {where}", reason, "all processes to meet there", remedy)


@contextmanager
def _stopped_by_signal(processes: Processes) -> Iterator[None]:
    """Launchers send SIGTERM to all when one has died, perhaps before anybody asked for news."""

    def stop(*_: Any) -> None:
        if processes.failed:
            return  # on its way out
        _ignore_signal()
        failure = None
        with suppress(RankError):
            failure = processes.failure()
        raise failure or RankError(processes.rank, _ENDED)

    if not _may_handle_signals():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


def _ignore_signal() -> None:
    if _may_handle_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _may_handle_signals() -> bool:
    return threading.current_thread() is threading.main_thread()
