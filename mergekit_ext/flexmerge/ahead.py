"""Reading files once, in a known order: ahead of who asks, and around the page cache.

Putting a file's pages into the cache and copying them out again costs more processor time than
merging does. For one pass over more than a machine's memory, or over files that nobody reads
again soon, that is work for nothing: pieces that are not in the cache are read straight from the
disk, several at a time, into memory that is taken once.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mergekit_ext.headers import TensorHeader

# Addresses, offsets and lengths of direct reads and of maps must be multiples of this.
_ALIGNMENT = max(4096, mmap.ALLOCATIONGRANULARITY)
_PIECE = 2 << 20
_PIECES = 24  # 48 MiB
# Disks answer several requests at a time faster than one.
_REQUESTS = 6


_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Piece:
    """Bytes ``[start, start + length)`` of a file, of which those from `skip` are wanted."""

    file: Path
    start: int
    length: int
    skip: int


class Ahead:
    """Reads tensors in the order in which they are announced.

    Args:
        wanted: all tensors that will be read, in order; tensors without a file or bytes are left
            out by both sides.
    """

    def __init__(self, wanted: Iterable[TensorHeader]):
        self._pieces = (piece for header in wanted for piece in _pieces_of(header))
        room = mmap.mmap(-1, _PIECE * _PIECES)  # aligned, unlike other memory
        whole = np.frombuffer(room, dtype=np.uint8)
        self._free = deque(whole[i * _PIECE : (i + 1) * _PIECE] for i in range(_PIECES))
        self._begun: deque[tuple[_Piece, _Bytes, Future[int | None]]] = deque()
        self._threads = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="mergekit-ext-ahead")
        self._begin()

    def read(self, header: TensorHeader, out: Tensor) -> None:
        """Fill `out`, a flat CPU tensor as many bytes long as the next announced one.

        Raises:
            OSError: the file is gone, or shorter than it was.
        """
        target = out.view(torch.uint8).numpy()
        done = 0
        while done < header.nbytes:
            piece, room, future = self._begun.popleft()
            found = future.result()
            count = min(piece.length - piece.skip, header.nbytes - done)
            if found is None:
                _read_cached(piece, target[done : done + count])
            elif found < piece.skip + count:
                raise _too_short(piece.file)
            else:
                np.copyto(target[done : done + count], room[piece.skip : piece.skip + count])
            done += count
            self._free.append(room)
            self._begin()

    def close(self) -> None:
        """Let nothing more be read."""
        self._threads.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        while self._free and (piece := next(self._pieces, None)) is not None:
            room = self._free.popleft()
            self._begun.append((piece, room, self._threads.submit(_read, piece, room)))


def _pieces_of(header: TensorHeader) -> Iterator[_Piece]:
    if header.file is None or not header.nbytes:
        return
    end = header.offset + header.nbytes
    start = header.offset - header.offset % _ALIGNMENT
    while start < end:
        # The last one is read to a multiple of the alignment, or to the end of the file.
        length = min(_PIECE, end - start)
        yield _Piece(header.file, start, length, max(0, header.offset - start))
        start += _PIECE


def _read(piece: _Piece, room: _Bytes) -> int | None:
    """Read around the page cache; None if it has the bytes, or the file system cannot do that."""
    handle = os.open(piece.file, os.O_RDONLY)
    try:
        if _cached(handle, piece):
            return None
    finally:
        os.close(handle)
    length = -(-piece.length // _ALIGNMENT) * _ALIGNMENT
    try:
        handle = os.open(piece.file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        done = 0
        while done < piece.length:
            count = os.preadv(handle, [room[done:length].data], piece.start + done)
            if not count:
                break
            done += count
        return done
    except OSError:
        return None
    finally:
        os.close(handle)


def _read_cached(piece: _Piece, target: _Bytes) -> None:
    view = target.data
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.start + piece.skip)
        done = 0
        while done < view.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise _too_short(piece.file)
            done += count


def _too_short(file: Path) -> OSError:
    return OSError(f"{file} is shorter than its header says")


def _cached(handle: int, piece: _Piece) -> bool:
    """Whether the page cache holds all of a piece. Where the system does not tell, it says yes."""
    mincore = _mincore()
    if mincore is None or not hasattr(os, "O_DIRECT"):
        return True
    size = os.fstat(handle).st_size
    length = min(piece.length, size - piece.start)
    if length <= 0:
        return True
    with mmap.mmap(handle, length, access=mmap.ACCESS_READ, offset=piece.start) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        pages = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
        failed = mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(length),
            ctypes.c_void_p(pages.ctypes.data),
        )
        del view  # or the map could not be closed
    return bool(failed) or bool((pages & 1).all())


@functools.cache
def _mincore() -> Callable[..., int] | None:
    try:
        function: Any = ctypes.CDLL(None).mincore
    except (OSError, AttributeError, TypeError):  # not everywhere is there such a call
        return None
    return function
