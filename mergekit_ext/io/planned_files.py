"""Planned safetensors files, which several processes write tensor by tensor, and their index.

The header of a planned file comes first, and every tensor has its place, so its bytes depend
neither on the order in which tensors come nor on the number of processes that write them.
"""

import json
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ext.io.headers import TensorHeader

INDEX = "model.safetensors.index.json"
# A FlexMerge may have thousands of files.
_OPEN_FILES = 64
_READ = 1 << 24


def split(entries: Iterable[TensorHeader], limit: int) -> list[tuple[TensorHeader, ...]]:
    """Cut a row of tensors into files of at most `limit` bytes, or of one tensor; 0: one file."""
    files: list[list[TensorHeader]] = []
    size = 0
    for entry in entries:
        if not files or (limit > 0 and size + entry.nbytes > limit):
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return [tuple(file) for file in files]


def weight_names(count: int, *, numbered: bool = False) -> list[str]:
    """Return the names of the files of a checkpoint; a single one has a number if `numbered`."""
    if count == 1 and not numbered:
        return ["model.safetensors"]
    return [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]


def write_index(
    folder: Path, files: Iterable[tuple[str, Sequence[TensorHeader]]], **metadata: object
) -> None:
    """Write the index of a checkpoint as transformers does, of named files and their tensors."""
    placed = [(entry, name) for name, entries in files for entry in entries]
    total = sum(entry.nbytes for entry, _ in placed)
    weights = {entry.name: name for entry, name in placed}
    content = {"metadata": {"total_size": total, **metadata}, "weight_map": weights}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class PlannedFile:
    """A file's path in its folder, and its tensors in the order of their bytes."""

    path: str
    entries: tuple[TensorHeader, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return [0, *accumulate(entry.nbytes for entry in self.entries)]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the first tensor."""
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for entry, place in zip(self.entries, pairwise(self._ends), strict=True):
            shape = list(entry.shape)
            content[entry.name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": place}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @cached_property
    def places(self) -> dict[str, tuple[int, TensorHeader]]:
        """Where in the file the bytes of each tensor start."""
        starts = (len(self.header) + end for end in self._ends)
        return {e.name: (start, e) for start, e in zip(starts, self.entries, strict=False)}

    @property
    def length(self) -> int:
        return len(self.header) + self._ends[-1]


class PlannedFiles:
    """Open planned files in one folder. Not for use by several threads at once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, int] = {}

    def start(self, files: Collection[PlannedFile]) -> None:
        """Make all files, and leave nothing else that an earlier run has left in the folder."""
        known = {self._folder / file.path for file in files}
        # What is in a folder comes before it.
        for path in sorted(self._folder.rglob("*"), reverse=True):
            if path.is_symlink() or not path.is_dir():
                if path not in known:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
        self.create(files)

    def create(self, files: Iterable[PlannedFile]) -> None:
        """Make files with their headers, at their full length; those that are there stay.

        One process does this, before any of them writes.
        """
        for file in files:
            path = self._folder / file.path
            if path.is_symlink():  # what it leads to is not ours to write
                path.unlink()
            if path.exists() and path.stat().st_size == file.length:
                with path.open("rb") as found:
                    if found.read(len(file.header)) == file.header:
                        continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as made:
                made.write(file.header)
                made.truncate(file.length)

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
        """Return the CRC-32 of what lies in the place of a tensor."""
        start, entry = file.places[name]
        handle = self._handle(file.path)
        found, done = 0, 0
        while data := os.pread(handle, min(_READ, entry.nbytes - done), start + done):
            found = zlib.crc32(data, found)
            done += len(data)
        return found

    def close(self) -> None:
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
    """Return a tensor's bytes in row-major order; shared with it if it lies so on the CPU."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())
