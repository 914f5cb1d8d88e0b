"""Work on pieces of tensors in threads of our own, alike whatever their number.

torch splits every operation over its threads and waits for all of them, which costs more than a
small operation does. Pieces that fit a core's cache are better done whole by one thread each:
torch releases the interpreter's lock while it computes.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_local = threading.local()

_Arguments = ParamSpec("_Arguments")
_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def in_threads(
    work: Callable[[_Piece], _Result], pieces: Iterable[_Piece], device: torch.device
) -> list[_Result]:
    """Return ``[work(piece) for piece in pieces]``, on a CPU by as many threads as torch uses."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        # A pool of one would cost more than it does for small pieces.
        with torch.no_grad():
            return [work(piece) for piece in pieces]
    return list(in_turn(work, pieces, device))


def in_turn(
    work: Callable[[_Piece], _Result], pieces: Iterable[_Piece], device: torch.device
) -> Iterator[_Result]:
    """Return an iterator over what `in_threads` returns; the work may be ahead of it."""
    # A worker that waited for its own pool would wait for ever.
    if device.type != "cpu" or getattr(_local, "worker", False):
        return map(work, pieces)
    return _pool(torch.get_num_threads()).map(work, pieces)


def by_one_thread(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return `function`, whose operations on a CPU torch leaves to the thread that calls it."""

    @functools.wraps(function)
    def alone(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        before = torch.get_num_threads()
        if before == 1:
            return function(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return alone


def scratch(count: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised ``(count, length)`` memory, this thread's own until its next call.

    Fresh memory for every piece, whose pages are faulted in again, costs more than the sums. That
    of an accelerator is its allocator's to keep.
    """
    if device.type != "cpu":
        return torch.empty((count, length), dtype=dtype, device=device)
    kept: dict[tuple[torch.dtype, torch.device], Tensor] = _local.__dict__.setdefault("kept", {})
    key, size = (dtype, device), count * length
    if key not in kept or kept[key].numel() < size:
        kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size].view(count, length)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mergekit-ext", initializer=_prepare_thread)


def _prepare_thread() -> None:
    _local.worker = True
    # Asked first: a thread that has not asked takes the number of another one when it computes.
    torch.get_num_threads()
    torch.set_num_threads(1)
    # The caller's `no_grad` does not reach another thread.
    torch.set_grad_enabled(False)
