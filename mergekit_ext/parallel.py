"""Which process does what when several make one output.

One process is the ordinary case: `current` then returns `Ranks()`, which needs no other process.
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

from mergekit_ext.errors import ConfigError, Problem, RankError

_T = TypeVar("_T")
_REMEDY = "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE."
_MOST = 1 << 20
_MEETING = timedelta(minutes=5)
# The first process to come to a collective waits there while another one may merge for days.
_WORK = timedelta(days=365)


class _Mark(Enum):
    """What a process that ends sends in place of a value; pickled by name."""

    PARTED = "parted"


class Ranks:
    """The processes of a merge, seen from one of them. This class: one process alone.

    Every process makes the same calls of `gather`, `from_main` and `wait` in the same order. When
    another process has ended, or has called `part`, they raise `RankError`.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._posted: list[Any] = []
        self._received: list[Any] = []

    @property
    def is_main(self) -> bool:
        """Whether this process writes what exists once: index, card, manifest."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return the rank that each piece of work belongs to.

        The largest piece comes first; each goes to the rank with the least work, the lowest of
        several. The answer is the same in all processes.
        """
        loads = [(0, rank) for rank in range(self.size)]
        owners = [0] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            load, rank = heapq.heappop(loads)
            owners[index] = rank
            heapq.heappush(loads, (load + sizes[index], rank))
        return owners

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in order of rank, in every process."""
        posted, self._posted = self._posted, []
        found = self._exchange((value, posted))
        if self.is_main:
            self._received += [message for _, messages in found for message in messages]
        values = [value for value, _ in found]
        if value is not _Mark.PARTED and any(v is _Mark.PARTED for v in values):
            raise RankError
        return values

    def from_main(self, make: Callable[[], _T]) -> _T:
        """Return in every process what `make` returns in the main one; it runs there only."""
        found: list[Any] = self.gather(make() if self.is_main else None)
        made: _T = found[0]
        return made

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.gather(None)

    def part(self) -> None:
        """End with an error of this process: whatever the others gather, they get `RankError`.

        Raises:
            RankError: another process has ended before.
        """
        self.gather(_Mark.PARTED)

    def post(self, message: Any) -> None:
        """Send the main process a message with the next `gather`."""
        self._posted.append(message)

    def received(self) -> list[Any]:
        """Return, in the main process, the messages since the last call, in order of rank."""
        messages, self._received = self._received, []
        return messages

    def _exchange(self, value: _T) -> list[_T]:
        return [value]


class Group(Ranks):
    """The processes of torch.distributed's default group, whose backend is gloo."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rank, self.size = rank, size

    def _exchange(self, value: _T) -> list[_T]:
        import torch.distributed as distributed

        found: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(found, value)
        except RuntimeError:  # all errors of torch.distributed are: a connection was closed
            raise RankError from None
        return found


_current: list[Ranks] = [Ranks()]


def current() -> Ranks:
    """Return the processes that this one works with."""
    return _current[-1]


@contextmanager
def joined(ranks: Ranks) -> Iterator[Ranks]:
    """Inside, `current` returns `ranks`."""
    _current.append(ranks)
    try:
        yield ranks
    finally:
        _current.remove(ranks)


def launched_size() -> int:
    """Return how many processes a launcher has started, this one included; 1 without a launcher.

    Raises:
        ConfigError: a variable of the launcher is missing, or not what a launcher sets.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 1
    problems, last = [], _MOST
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, "")
        found = int(text) if re.fullmatch("[0-9]{1,7}", text) else -1
        if not least <= found <= last:
            expected = f"a number from {least} to {last}"
            problems.append(Problem(name, repr(text), expected, _REMEDY))
        elif name == "WORLD_SIZE":
            last = found - 1
    if problems:
        raise ConfigError(problems)
    return last + 1


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
    """Join the processes of one launcher; inside, `current` returns them.

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
        remedy = (
            "Check that all were started, that they reach this address, and, with several network "
            "interfaces, that GLOO_SOCKET_IFNAME names the right one."
        )
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        found, expected = str(error).partition("\n")[0], "all processes to meet there"
        problem = Problem(f"MASTER_ADDR, {place}", found, expected, remedy)
        raise ConfigError([problem]) from None
    with joined(Group(rank, size)) as processes:
        yield processes
        processes.wait()
    distributed.destroy_process_group()


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
