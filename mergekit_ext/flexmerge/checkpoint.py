"""The tensors of an opened FlexMerge checkpoint, task by task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ext.errors import CheckpointError, Problem
from mergekit_ext.flexmerge import task_folders
from mergekit_ext.flexmerge.contents import Shelf, shelf_of
from mergekit_ext.flexmerge.manifest import BASE, DENSE, MASKED, MASKS, UNIFIED, Manifest
from mergekit_ext.flexmerge.stored import StoredFile
from mergekit_ext.kernels.masks import reconstruct, unpack_bits

_CPU = torch.device("cpu")


class Checkpoint:
    """An opened checkpoint, made by `mergekit_ext.flexmerge.reader.open_checkpoint`.

    Attributes:
        folder: where it lies, resolved.
        manifest: what it holds.
    """

    def __init__(self, folder: Path, manifest: Manifest, files: Sequence[StoredFile]):
        self.folder, self.manifest, self._files = folder, manifest, files
        self._places: dict[Shelf, dict[str, StoredFile]] = {}
        for file in files:
            places = self._places.setdefault(shelf_of(file.file), {})
            places.update(dict.fromkeys(file.headers, file))
        self._loaded: dict[tuple[Shelf, str, torch.device], Tensor] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(task.name for task in self.manifest.tasks)

    def warn_of_copies(self) -> None:
        """Warn where the tasks' folders hold copies of the shards, and no links."""
        task_folders.warn_of_copies(self.folder, self.manifest, self._files)

    def known_task(self, task: str) -> str:
        """`task`, if the checkpoint has it.

        Raises:
            CheckpointError: it has not.
        """
        if task in self.tasks:
            return task
        problem = Problem("task", repr(task), f"one of {', '.join(self.tasks)}")
        raise CheckpointError([problem], str(self.folder))

    def tensors(self, task: str, device: str | torch.device = "cpu") -> TaskTensors:
        """The tensors of one task by their ordinary names, each made when it is asked for.

        Dense tensors are loaded once for each device and kept as long as the checkpoint is: all
        tasks that share one get the same object. On the CPU its storage is the mapped file, so that
        what is not used takes no memory, and writing to it changes no file. A tensor of a masked
        block is reconstructed at every access and is the caller's own.

        Raises:
            CheckpointError: the checkpoint has no such task.
        """
        return TaskTensors(self, self.known_task(task), torch.device(device))

    def stored(self, shelf: Shelf, name: str, device: torch.device = _CPU) -> Tensor:
        """A tensor as the files hold it, loaded once for each device."""
        key = (shelf, name, device)
        if key not in self._loaded:
            self._loaded[key] = self.read(shelf, name).to(device)
        return self._loaded[key]

    def read(self, shelf: Shelf, name: str) -> Tensor:
        """A tensor as the files hold it, on the CPU, not kept."""
        return self._places[shelf][name].tensor(name)

    def path(self, shelf: Shelf, name: str) -> Path:
        """The file of a tensor, links resolved."""
        return self._places[shelf][name].path


@dataclass(frozen=True)
class _Masked:
    """Where one tensor of a masked block lies."""

    block: str
    tasks: tuple[str, ...]
    rescale: float
    start: int
    count: int


class TaskTensors(Mapping[str, Tensor]):
    """See `Checkpoint.tensors`. Names come in the order of the manifest."""

    def __init__(self, checkpoint: Checkpoint, task: str, device: torch.device):
        self._checkpoint, self._task, self._device = checkpoint, task, device
        self._sources: dict[str, Shelf | _Masked] = {}
        for block in checkpoint.manifest.blocks:
            group = next(group for group in block.groups if task in group.tasks)
            start = 0
            for tensor in block.tensors:
                count = math.prod(tensor.shape)
                self._sources[tensor.name] = (
                    _Masked(block.name, group.tasks, group.rescale[task], start, count)
                    if group.kind == MASKED
                    else Shelf(DENSE, group.tasks)
                )
                start += count
        for entry in checkpoint.manifest.private:
            if entry.task == task:
                own = Shelf(DENSE, (task,))
                self._sources.update({tensor.name: own for tensor in entry.tensors})

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        if isinstance(source, Shelf):
            return self._checkpoint.stored(source, name, self._device)
        return self._reconstructed(name, source)

    def is_stored(self, name: str) -> bool:
        """Whether the tensor is in the files as it is, so that every access gives the same one."""
        return isinstance(self._sources[name], Shelf)

    def file(self, name: str) -> Path:
        """The file that holds a tensor for which `is_stored`, under its name."""
        shelf = self._sources[name]
        assert isinstance(shelf, Shelf)
        return self._checkpoint.path(shelf, name)

    def _reconstructed(self, name: str, source: _Masked) -> Tensor:
        read, device = self._checkpoint.read, self._device
        base = read(Shelf(BASE, ()), name).to(device)
        unified = read(Shelf(UNIFIED, source.tasks), name).to(device)
        bits = read(Shelf(MASKS, (self._task,)), source.block)
        # The bytes that hold this tensor's bits, the first of which may start in mid-byte.
        first, before = divmod(source.start, 8)
        end = -(-(source.start + source.count) // 8)
        mask = unpack_bits(bits[first:end].to(device), before + source.count)[before:]
        return reconstruct(base, unified, mask, source.rescale, unified.dtype)
