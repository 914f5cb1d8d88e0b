"""Writing safetensors files whose content is known before the first byte: header first, then data
as it comes."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mergekit_ext.flexmerge.manifest import SHARDS, ShardFile
from mergekit_ext.headers import dtype_name

# A file per set of tasks may mean thousands of files.
_OPEN_FILES = 64


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


@dataclass
class _Shard:
    path: str
    kind: str
    tasks: tuple[str, ...]
    entries: list[Entry] = field(default_factory=list)
    written: int = 0
    length: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


Key = tuple[str, tuple[str, ...]]  # kind of file, set of tasks


class ShardWriter:
    """Writes every shard of a checkpoint at once, tensor by tensor, holding none of them.

    Tensors of one kind and set of tasks must come in the order in which they were declared.
    Digests are computed on the way: what is given to `write` must stay as it is until the call
    after the next.
    """

    def __init__(self, folder: Path, declared: Mapping[Key, Sequence[Entry]], shard_size: int):
        self._folder = folder
        (folder / SHARDS).mkdir()
        self._shards: dict[Key, list[_Shard]] = {}
        self._open: dict[str, IO[bytes]] = {}
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._hashing: Future[None] | None = None
        counts: dict[str, int] = {}
        for (kind, tasks), entries in declared.items():
            for shard in _split(entries, shard_size):
                counts[kind] = counts.get(kind, 0) + 1
                path = f"{SHARDS}/{kind}-{counts[kind]:05d}.safetensors"
                made = _Shard(path, kind, tasks, shard)
                self._shards.setdefault((kind, tasks), []).append(made)
                self._append(made, memoryview(_header(shard)))

    def write(self, key: Key, name: str, tensor: Tensor) -> None:
        """Append the next tensor of its set; its dtype and size must be those declared."""
        shard = next(s for s in self._shards[key] if s.written < len(s.entries))
        entry = shard.entries[shard.written]
        data = memoryview(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
        if entry.name != name or entry.nbytes != data.nbytes:
            raise AssertionError(f"{name} ({data.nbytes} bytes) was declared as {entry}")
        shard.written += 1
        self._append(shard, data)

    def finish(self) -> tuple[ShardFile, ...]:
        """Close the files; return what the manifest says of them."""
        shards = [shard for found in self._shards.values() for shard in found]
        for shard in shards:
            if shard.written != len(shard.entries):
                raise AssertionError(f"{shard.path} lacks {shard.entries[shard.written].name}")
        if self._hashing is not None:
            self._hashing.result()
        self.close()
        return tuple(
            ShardFile(s.path, s.kind, s.tasks, s.length, s.digest.hexdigest()) for s in shards
        )

    def where(self, key: Key) -> Sequence[tuple[str, Sequence[Entry]]]:
        """The files of one set of tasks, with what is in each."""
        return [(shard.path, shard.entries) for shard in self._shards.get(key, ())]

    def close(self) -> None:
        """Close all files, whole or not."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._hasher.shutdown()

    def _append(self, shard: _Shard, data: memoryview) -> None:
        if not data.nbytes:
            return
        before, self._hashing = self._hashing, self._hasher.submit(shard.digest.update, data)
        file = self._file(shard.path)
        done = 0
        while done < data.nbytes:
            done += file.write(data[done:])
        shard.length += data.nbytes
        if before is not None:
            before.result()

    def _file(self, path: str) -> IO[bytes]:
        file = self._open.pop(path, None)
        if file is None:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            file = (self._folder / path).open("ab", buffering=0)
        self._open[path] = file  # the least recently used comes first
        return file


def _split(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not shards or (limit > 0 and size + entry.nbytes > limit):
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _header(entries: Sequence[Entry]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        content[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.nbytes],
        }
        start += entry.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
