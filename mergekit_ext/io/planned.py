"""Safetensors files whose content is known before the first byte: any process writes any tensor.

The header comes first, and every tensor has its place, so the bytes of a file depend neither on
the order in which tensors come nor on the number of processes that write them.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ext.io.headers import dtype_name

# A FlexMerge may have thousands of files.
_OPEN_FILES = 64
INDEX = "model.safetensors.index.json"
_READ = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written. `dtype` is the format's name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Entry:
        """An entry of a torch dtype."""
        return cls(name, dtype_name(dtype), tuple(shape), math.prod(shape) * dtype.itemsize)


def split(entries: Iterable[Entry], limit: int) -> list[tuple[Entry, ...]]:
    """Cut a row of tensors into files of at most `limit` bytes, or of one tensor; 0: one file."""
    files: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not files or (limit > 0 and size + entry.nbytes > limit):
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return [tuple(file) for file in files]


def weight_names(count: int, *, numbered: bool = False) -> list[str]:
    """Return what the files of a checkpoint are called; `numbered`: a single one is, too."""
    if count == 1 and not numbered:
        return ["model.safetensors"]
    return [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]


def write_index(
    folder: Path, files: Iterable[tuple[str, Sequence[Entry]]], **metadata: object
) -> None:
    """Write the index of a checkpoint as transformers does: in which file each tensor is.

    Args:
        folder: of the checkpoint.
        files: the name of each, and the tensors in it.
        metadata: beside the size of all tensors.
    """
    placed = [(entry, name) for name, entries in files for entry in entries]
    total = sum(entry.nbytes for entry, _ in placed)
    content = {
        "metadata": {"total_size": total, **metadata},
        "weight_map": {entry.name: name for entry, name in placed},
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class PlannedFile:
    """A file's path in its folder, and its tensors in the order of their bytes."""

    path: str
    entries: tuple[Entry, ...]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the first tensor."""
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in self.entries:
            content[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.nbytes],
            }
            start += entry.nbytes
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @cached_property
    def places(self) -> dict[str, tuple[int, Entry]]:
        """Where in the file the bytes of each tensor start."""
        found = {}
        start = len(self.header)
        for entry in self.entries:
            found[entry.name] = (start, entry)
            start += entry.nbytes
        return found

    @property
    def length(self) -> int:
        """Of the whole file, in bytes."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


class PlannedFiles:
    """Open planned files in one folder. Not for use by several threads at once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, int] = {}

    def create(self, files: Iterable[PlannedFile]) -> None:
        """Make files with their headers, at their full length; those that are there stay.

        One process does this, before any of them writes.
        """
        for file in files:
            path = self._folder / file.path
            if _is_begun(path, file):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as made:
                made.write(file.header)
                made.truncate(file.length)

    def write(self, file: PlannedFile, name: str, tensor: Tensor) -> int:
        """Put a tensor in its place; return the CRC-32 of its bytes."""
        entry = file.places[name][1]
        if dtype_name(tensor.dtype) != entry.dtype:
            raise AssertionError(f"{name} ({tensor.dtype}) was planned as {entry}")
        data = as_bytes(tensor)
        self.put(file, name, data)
        return zlib.crc32(data)

    def put(self, file: PlannedFile, name: str, data: memoryview) -> None:
        """Put the bytes of a tensor in its place."""
        start, entry = file.places[name]
        if data.nbytes != entry.nbytes:
            raise AssertionError(f"{name} ({data.nbytes} bytes) was planned as {entry}")
        handle = self._handle(file.path)
        done = 0
        while done < data.nbytes:
            done += os.pwrite(handle, data[done:], start + done)

    def crc(self, file: PlannedFile, name: str) -> int:
        """The CRC-32 of what lies in the place of a tensor."""
        start, entry = file.places[name]
        handle = self._handle(file.path)
        found, done = 0, 0
        while done < entry.nbytes:
            data = os.pread(handle, min(_READ, entry.nbytes - done), start + done)
            if not data:
                break
            found = zlib.crc32(data, found)
            done += len(data)
        return found

    def close(self) -> None:
        """Close all files, whole or not."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def _handle(self, path: str) -> int:
        handle = self._open.pop(path, None)
        if handle is None:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            handle = os.open(self._folder / path, os.O_RDWR)
        self._open[path] = handle  # the least recently used comes first
        return handle


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; shared with it if it lies so on the CPU."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _is_begun(path: Path, file: PlannedFile) -> bool:
    if path.is_symlink():  # what it leads to is not ours to write
        path.unlink()
    if not path.exists() or path.stat().st_size != file.length:
        return False
    with path.open("rb") as found:
        return found.read(len(file.header)) == file.header
