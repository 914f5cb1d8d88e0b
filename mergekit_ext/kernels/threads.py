"""Work on pieces of tensors in threads of our own.

torch splits every operation over its threads and waits for all of them, which costs more than a
small operation does, and a hundred times more when another process has one of the cores. Pieces
that fit a core's cache are better done whole by one thread each: torch releases the interpreter's
lock while it computes. Each piece is computed alike whatever the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def in_threads(
    work: Callable[[_Piece], _Result], pieces: Iterable[_Piece], device: torch.device
) -> list[_Result]:
    """Return ``[work(piece) for piece in pieces]``.

    On a CPU by as many threads as torch uses; a GPU is fed by one, and has its own parallelism.
    """
    if device.type != "cpu":
        return [work(piece) for piece in pieces]
    return list(_pool(torch.get_num_threads()).map(work, pieces))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        threads, thread_name_prefix="mergekit-ext", initializer=_prepare_thread
    )


def _prepare_thread() -> None:
    torch.set_num_threads(1)
    # The caller's `no_grad` does not reach another thread.
    torch.set_grad_enabled(False)
