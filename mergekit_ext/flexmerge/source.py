"""Reading stored tensors into place: one block of all models at a time."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ext.flexmerge.layout import FLOATING, BlockLayout, Layout
from mergekit_ext.io.headers import TensorHeader

# Linux reads no more than its read-ahead window for one request, commonly this much.
_READ_AHEAD = 128 << 10


class Source:
    """The stored tensors of one model, which `load` returns by their stored names.

    A header's own name is the stored one. `files` are where they lie, so that a change can be
    noticed.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, TensorHeader],
        load: Callable[[str], Tensor],
        files: Collection[Path] = (),
    ):
        self.name, self.tensors, self.files = name, tensors, files
        self._load = load

    def tensor(self, name: str) -> Tensor:
        """Return the stored tensor; mapped, where that is possible, so that it costs no memory."""
        return self._load(self.tensors[name].name)

    def read(self, name: str, out: Tensor) -> None:
        """Fill `out`, a flat CPU tensor as many bytes long as the stored one.

        What a header has a file of is read straight. A plain read copies at memory speed; a memory
        map would pay a page fault every 4 KiB, ten times as much on virtual machines.
        """
        header = self.tensors[name]
        if header.file is None:
            stored = self.tensor(name).contiguous().reshape(-1)
            out.view(torch.uint8).copy_(stored.view(torch.uint8))
        elif header.nbytes:
            view = memoryview(out.view(torch.uint8).numpy())[: header.nbytes]
            with header.file.open("rb") as file:
                file.seek(header.offset)
                # Straight into its place, but for what is less than a buffer.
                if file.readinto(view) < header.nbytes:
                    raise OSError(f"{header.file} ends before {name} does")

    def expect(self, name: str) -> None:
        """Prepare for a `read` that comes soon."""
        header = self.tensors[name]
        if header.file is None or not hasattr(os, "posix_fadvise"):
            return
        descriptor = os.open(header.file, os.O_RDONLY)
        try:
            for start in range(header.offset, header.offset + header.nbytes, _READ_AHEAD):
                os.posix_fadvise(descriptor, start, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


class FileSource(Source):
    """Tensors in safetensors files."""

    def __init__(self, name: str, tensors: Mapping[str, TensorHeader]):
        own = {header.name: header for header in tensors.values()}
        stored = (part.file for header in own.values() for part in header.stored)
        files = {file for file in stored if file is not None}
        super().__init__(name, tensors, lambda stored: own[stored].load(), files)


@dataclass(frozen=True)
class BlockData:
    """One block in memory: the vector of the base, (n,), and by task that of its model, (n,)."""

    layout: BlockLayout
    base: Tensor
    models: Mapping[int, Tensor]

    def part(self, vector: Tensor, index: int) -> Tensor:
        """Return one tensor of a block vector, in its shape."""
        part = self.layout.parts[index]
        return vector[part.slice].view(part.shape)


class BlockReader:
    """Reads blocks of a base and m models, on one device.

    A vector's dtype is the one that holds all its parts (float64 in every block if it is in one:
    what trimming keeps of a model is one threshold). What was read before is gone with the next
    `read`, which uses its memory.
    """

    def __init__(self, layout: Layout, base: Source, models: Sequence[Source], device: str = "cpu"):
        self.layout, self._device = layout, torch.device(device)
        self.base, self.models = base, tuple(models)
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        self._bytes = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._largest = max(block.size for block in layout.blocks)
        self._place = {block.name: index for index, block in enumerate(layout.blocks)}
        self._last, self._expected = -1, 0  # the place last read, and where announcing goes on
        # A thread of its own: the system lets a thread wait that announces more than its queue
        # holds.
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="mergekit-ext-ahead")

    def read(self, block: BlockLayout, members: Sequence[int] | None = None) -> BlockData:
        """Return the block of the base and of the members' models (default: of all)."""
        chosen = range(len(self.models)) if members is None else members
        base = self._vector(-1, self.base, block)
        models = {member: self._vector(member, self.models[member], block) for member in chosen}
        self._expect(self._place[block.name], [self.base, *(self.models[m] for m in chosen)])
        return BlockData(block, base, models)

    def _expect(self, place: int, sources: Sequence[Source]) -> None:
        """Announce what will be read after `place`: as much as the largest block holds."""
        # Announcing one block would leave the disk idle before a small one.
        if not self._last < place < self._expected:
            self._expected = place + 1
        self._last = place
        ahead = sum(block.size for block in self.layout.blocks[place + 1 : self._expected])
        for block in self.layout.blocks[self._expected :]:
            if ahead >= self._largest:
                return
            self._ahead.submit(_announce, sources, block)
            ahead += block.size
            self._expected += 1

    def read_stored(self, member: int, name: str) -> Tensor:
        """Return the bytes of one stored tensor, on the CPU, until the call after the next.

        The member -1 is the base, here and in `tensor`.
        """
        source = self._source(member)
        header = source.tensors[name]
        self._bytes.reverse()
        if self._bytes[0].numel() < header.nbytes:
            self._bytes[0] = torch.empty(0)  # let go before more is taken
            self._bytes[0] = torch.empty(header.nbytes, dtype=torch.uint8)
        stored = self._bytes[0][: header.nbytes]
        source.read(name, stored)
        return stored

    def tensor(self, member: int, name: str) -> Tensor:
        """Return one tensor of one model as it is stored, in memory of its own."""
        return self._source(member).tensor(name)

    def _source(self, member: int) -> Source:
        return self.base if member < 0 else self.models[member]

    def _vector(self, index: int, source: Source, block: BlockLayout) -> Tensor:
        dtypes = [FLOATING[source.tensors[part.name].dtype] for part in block.parts]
        dtype = reduce(torch.promote_types, dtypes)
        if self.layout.dtype == torch.float64:
            dtype = torch.float64
        # One buffer is enough off the CPU, where `to` copies.
        key = (index if self._device.type == "cpu" else 0, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._largest, dtype=dtype)
        vector = self._buffers[key][: block.size]
        for part, stored in zip(block.parts, dtypes, strict=True):
            piece = vector[part.slice]
            if stored == dtype:
                source.read(part.name, piece)
            else:
                narrow = torch.empty(piece.shape, dtype=stored)
                source.read(part.name, narrow)
                piece.copy_(narrow)
        return vector if self._device.type == "cpu" else vector.to(self._device)


def _announce(sources: Sequence[Source], block: BlockLayout) -> None:
    # Nothing is lost without: a file that is gone is reported when it is read.
    with suppress(OSError):
        for source in sources:
            for part in block.parts:
                source.expect(part.name)
