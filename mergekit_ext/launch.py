"""What ``accelerate launch`` and torchrun say of the processes that they have started."""

from __future__ import annotations

import os
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
_MEETING = timedelta(minutes=5)


def launched_size() -> int:
    """How many processes a launcher has started, this one among them; 1 without a launcher.

    Raises:
        ConfigError: the variables of the launcher are not what they should be.
    """
    found = os.environ.get("WORLD_SIZE", "1")
    if not found.isdecimal() or int(found) < 1:
        raise ConfigError([Problem("WORLD_SIZE", repr(found), "a number of processes")])
    missing = [name for name in _NEEDED if name not in os.environ]
    if int(found) > 1 and missing:
        remedy = "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE."
        named = ", ".join(missing)
        raise ConfigError(
            [Problem("environment", f"WORLD_SIZE={found} without {named}", "all of them", remedy)]
        )
    return int(found)


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
            with suppress(RankError):
                processes.close(error)
            raise
        processes.close()


def own_device(device: str) -> str:
    """The device of this process, for `device` as the user names it: ``cuda`` is one GPU each.

    Raises:
        ConfigError: the user names one GPU for all processes.
    """
    kind, _, number = device.partition(":")
    if launched_size() == 1 or kind == "cpu":
        return device
    if number:
        remedy = f"Write {kind}: every process takes a device of its own."
        raise ConfigError([Problem("--device", device, f"{kind}, with several processes", remedy)])
    import torch

    count = getattr(torch, kind).device_count()
    # Without a device the merge says so itself, as it does for one process.
    return f"{kind}:{int(os.environ['LOCAL_RANK']) % count}" if count else device


@contextmanager
def _group() -> Iterator[Processes]:
    import torch.distributed as distributed
    from accelerate.state import PartialState

    # Small Python objects are all that is sent: gloo does it for processes with GPUs as well.
    state = PartialState(cpu=True, backend="gloo", timeout=_MEETING)
    store = distributed.distributed_c10d._get_default_store()
    try:
        yield Processes(
            distributed.PrefixStore("mergekit_ext", store), state.process_index, state.num_processes
        )
    finally:
        state.destroy_process_group()
        state._reset_state()


@contextmanager
def _stopped_by_signal(processes: Processes) -> Iterator[None]:
    """Launchers send SIGTERM to all when one has died, perhaps before anybody asked for news."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while it ends in good order
        failure = None
        with suppress(RankError):
            failure = processes.failure()
        reason = "the launcher ended it (SIGTERM), as it does when another process dies"
        raise failure or RankError(processes.rank, reason)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
