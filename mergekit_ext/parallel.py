"""Which process does what when several make one output.

One process is the ordinary case: `current` then returns `Ranks()`, which needs no other process.
"""

import heapq
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from mergekit_ext.errors import ConfigError, Problem, RankError, require

_K = TypeVar("_K")
_T = TypeVar("_T")
_REMEDY = "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE."
_MOST = 1 << 20
_MEETING = timedelta(minutes=5)
# The first process to come to a collective waits there while another one may merge for days.
_WORK = timedelta(days=365)


class Ranks:
    """The processes of a merge, seen from one of them: torch.distributed's default group.

    Every process makes the same calls of `gather`, `from_main` and `wait` in the same order. When
    another process has ended, or has called `part`, they raise `RankError`.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._posted: list[Any] = []
        self._received: list[Any] = []

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, sizes: Sequence[float]) -> list[int]:
        """Return the rank of each piece of work: the largest first, to the least busy rank."""
        loads = [(0.0, rank) for rank in range(self.size)]
        owners = [0] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            load, rank = heapq.heappop(loads)
            owners[index] = rank
            heapq.heappush(loads, (load + sizes[index], rank))
        return owners

    def own(self, pieces: Iterable[_T], size: Callable[[_T], float]) -> list[_T]:
        """Return the pieces of work that are this process's when all are shared out."""
        pieces = list(pieces)
        owners = self.share([*map(size, pieces)])
        return [piece for piece, owner in zip(pieces, owners, strict=True) if owner == self.rank]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in order of rank, in every process."""
        posted, self._posted = self._posted, []
        found = self._exchange((value, posted))
        if any(messages is None for _, messages in found):
            raise RankError
        if self.is_main:
            self._received += [message for _, messages in found for message in messages]
        return [value for value, _ in found]

    def gather_items(self, own: Mapping[_K, _T]) -> dict[_K, _T]:
        """Return the items of all processes' mappings, in every process."""
        return {key: value for part in self.gather(own) for key, value in part.items()}

    def from_main(self, make: Callable[[], _T]) -> _T:
        """Return in every process what `make` returns in the main one; it runs there only."""
        found: list[Any] = self.gather(make() if self.is_main else None)
        return found[0]

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.gather(None)

    def part(self) -> None:
        """End with an error of this process: whatever the others gather, they get `RankError`."""
        self._exchange((None, None))

    def post(self, message: Any) -> None:
        """Send the main process a message with the next `gather`."""
        self._posted.append(message)

    def received(self) -> list[Any]:
        """Return, in the main process, the messages since the last call, in order of rank."""
        messages, self._received = self._received, []
        return messages

    def _exchange(self, value: _T) -> list[_T]:
        if self.size == 1:
            return [value]
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
    """Let `current` return `ranks` inside."""
    _current.append(ranks)
    try:
        yield ranks
    finally:
        _current.remove(ranks)


def launched_size() -> int:
    """Return how many processes a launcher has started, or raise `ConfigError`; 1 without one."""
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
    require(problems)
    return last + 1


def require_one(command: str) -> bool:
    """Return whether to go on with a command that does not share its work out.

    Of several processes the first raises `ConfigError`, and the others have nothing to do.
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
    """Join the processes of one launcher, if there is one; inside, `current` returns them.

    A process that an error ends leaves the group when it exits, and so after its message: the
    others get `RankError` then. Processes that do not meet raise `ConfigError`.
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
    with joined(Ranks(rank, size)) as processes:
        yield processes
        processes.wait()
    distributed.destroy_process_group()


def own_device(device: str) -> str:
    """Return this process's own device of a kind such as ``cuda``, and make it the current one."""
    import torch

    kind = getattr(torch, device, None)
    if device == "cpu" or kind is None or not kind.device_count():
        return device
    number = int(os.environ["LOCAL_RANK"]) % kind.device_count()
    kind.set_device(number)
    return f"{device}:{number}"
