"""The processes that torchrun or ``accelerate launch`` started: their variables, their group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.parallel.ranks import Group, Ranks, current, joined

_REMEDY = "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE."
_MOST = 1 << 20
_MEETING = timedelta(minutes=5)
# The first process to come to a collective waits there while another one may merge for days.
_WORK = timedelta(days=365)


def launched_size() -> int:
    """Return how many processes a launcher has started, this one included; 1 without a launcher.

    Raises:
        ConfigError: a variable of the launcher is missing, or not what a launcher sets.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    last = int(size) - 1 if _is_number(size, 2, _MOST) else _MOST
    problems = [
        Problem(name, repr(found), f"a number from {least} to {most}", _REMEDY)
        for name, least, most in (
            ("WORLD_SIZE", 1, _MOST),
            ("RANK", 0, last),
            ("LOCAL_RANK", 0, last),
        )
        if not _is_number(found := os.environ.get(name, ""), least, most)
    ]
    if problems:
        raise ConfigError(problems)
    return last + 1


def _is_number(text: str, least: int, most: int) -> bool:
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(_MOST))
    return digits and least <= int(text) <= most


def require_one(command: str) -> bool:
    """Refuse several processes for a command that does not share its work out.

    Returns:
        whether to go on: in processes beside the first there is nothing to do.

    Raises:
        ConfigError: in the first process, if there are others.
    """
    size = launched_size()
    if size == 1 or current().size > 1:
        return True
    if int(os.environ["RANK"]) > 0:
        return False
    remedy = (
        "Start it alone, or merge with several: torchrun --nproc_per_node N -m mergekit_ext "
        "merge CONFIG OUT."
    )
    found = f"{size} processes for {command}"
    raise ConfigError([Problem("WORLD_SIZE", found, "one process", remedy)], "this command")


@contextmanager
def launched() -> Iterator[Ranks]:
    """Join the processes of one launcher; inside, `ranks.current` returns them.

    Without a launcher, or with one process, nothing changes. A process that an error ends leaves
    the group when it exits, and so after its message: the others get `RankError` then, if the
    launcher does not end them first.

    Raises:
        ConfigError: the variables of the launcher are wrong, or the processes do not meet.
    """
    if launched_size() == 1:
        yield current()
        return
    import torch.distributed as distributed

    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=_MEETING))
        # A launcher that starts all processes again may keep the store of those that failed.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"mergekit_ext/{attempt}", store)
        # Small Python objects are all that is sent: gloo does it for processes with GPUs as well.
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=_MEETING
        )
        # No public call gives connecting and collectives different times.
        distributed.distributed_c10d._set_pg_timeout(_WORK)
    except (RuntimeError, ValueError, TypeError) as error:  # of torch.distributed; of variables
        raise ConfigError([_not_met(error)]) from None
    with joined(Group(rank, size)) as processes:
        yield processes
        processes.wait()
    distributed.destroy_process_group()


def _not_met(error: Exception) -> Problem:
    found = str(error).partition("\n")[0]
    remedy = (
        "Check that all were started, that they reach this address, and, with several network "
        "interfaces, that GLOO_SOCKET_IFNAME names the right one."
    )
    where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return Problem(f"MASTER_ADDR, {where}", found, "all processes to meet there", remedy)


def own_device(device: str) -> str:
    """Return the device of this process, for ``cuda`` or another kind of which each takes its own.

    It becomes the kind's current device. A kind that is not here stays as it is.
    """
    import torch

    kind = getattr(torch, device, None)
    if device == "cpu" or kind is None or not kind.device_count():
        return device
    number = int(os.environ["LOCAL_RANK"]) % kind.device_count()
    kind.set_device(number)
    return f"{device}:{number}"
