"""Read a FlexMerge checkpoint: docs/flexmerge-format.md, "What a reader must check"."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ext.errors import MOST_SHOWN, CheckpointError, Problem
from mergekit_ext.flexmerge import task_folders
from mergekit_ext.flexmerge.files import StoredFile
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.manifest import (
    BASE,
    DENSE,
    MASKS,
    UNIFIED,
    Manifest,
    ShardFile,
    read_manifest,
)
from mergekit_ext.flexmerge.storage import MaskedTensor, Place, Shape, sources, stored
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.planned import Entry

_CPU = torch.device("cpu")


def open_checkpoint(folder: str | os.PathLike[str], verify: bool = False) -> Checkpoint:
    """Check a checkpoint and open its files.

    Args:
        folder: where ``flexmerge.json`` lies.
        verify: also compare every file with its digest, those in the tasks' folders too, which
            reads all of them.

    Raises:
        CheckpointError: the manifest or a file is not as the format says; all problems are in it,
            up to a hundred.
    """
    manifest = read_manifest(folder)
    root = Path(folder).resolve()
    opened = [_opened(root, entry, verify) for entry in manifest.files]
    files = [each for each in opened if isinstance(each, StoredFile)]
    problems = [each for each in opened if isinstance(each, Problem)]
    # Without a file its tensors would all be missing.
    if not problems:
        problems = list(islice(_content_problems(manifest, files), MOST_SHOWN))
        if verify:
            problems += task_folders.problems(root, manifest, files)
    if problems:
        raise CheckpointError(islice(problems, MOST_SHOWN), str(folder))
    return Checkpoint(root, manifest, files)


def _opened(root: Path, file: ShardFile, verify: bool) -> StoredFile | Problem:
    try:
        return StoredFile(root, file, verify)
    except CheckpointError as refused:
        return refused.problems[0]


def _place_of(file: ShardFile) -> Place:
    """Return where a file's tensors are. Those of the base are one set, whatever tasks it names."""
    return Place(file.kind, () if file.kind == BASE else file.tasks)


def _content_problems(manifest: Manifest, files: Sequence[StoredFile]) -> Iterator[Problem]:
    """Yield what the files hold and should not, and what they lack."""
    expected: dict[Place, dict[str, Shape]] = {}
    for block in manifest.blocks:
        for place, name, shape in stored(block.name, block.shapes, block.groups):
            expected.setdefault(place, {})[name] = shape
    for entry in manifest.private:
        shapes = {tensor.name: tensor.shape for tensor in entry.tensors}
        expected.setdefault(Place(DENSE, (entry.task,)), {}).update(shapes)
    found: dict[Place, dict[str, str]] = {}
    total = 0
    for file in files:
        path, place = file.file.path, _place_of(file.file)
        paths = found.setdefault(place, {})
        for name, header in file.headers.items():
            total += header.nbytes
            if name in paths:
                twice = f"{name}, which {paths[name]} holds too"
                yield Problem(path, twice, "each tensor in one file")
            paths[name] = path
            yield from _tensor_problems(file.file, header, expected.get(place, {}).get(name))
    for place, shapes in expected.items():
        for name in (name for name in shapes if name not in found.get(place, {})):
            yield Problem(name, f"nothing in {place}", "every tensor of the manifest's blocks")
    if total != manifest.size.bytes:
        wanted = f"{total}, the bytes of all tensors in the files"
        yield Problem("size.bytes", f"{manifest.size.bytes}", wanted)


def _tensor_problems(
    file: ShardFile, header: TensorHeader, shape: Shape | None
) -> Iterator[Problem]:
    where = f"{file.path}, tensor {header.name}"
    if shape is None:
        yield Problem(where, "a tensor that is not called for", "tensors of the manifest's blocks")
        return
    if header.shape != shape:
        yield Problem(where, f"shape {list(header.shape)}", f"{list(shape)}")
    if file.kind == MASKS and header.dtype != "U8":
        yield Problem(where, f"dtype {header.dtype}", "U8, as masks have")
    if file.kind in (BASE, UNIFIED) and header.dtype not in FLOATING:
        yield Problem(where, f"dtype {header.dtype}", f"one of {', '.join(FLOATING)}")


class Checkpoint:
    """A checkpoint that `open_checkpoint` has checked.

    Attributes:
        folder: where it lies, resolved.
        manifest: what it holds.
    """

    def __init__(self, folder: Path, manifest: Manifest, files: Sequence[StoredFile]):
        self.folder, self.manifest, self._files = folder, manifest, files
        self._places: dict[Place, dict[str, StoredFile]] = {}
        for file in files:
            places = self._places.setdefault(_place_of(file.file), {})
            places.update(dict.fromkeys(file.headers, file))
        self._loaded: dict[tuple[Place, str, torch.device], Tensor] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(task.name for task in self.manifest.tasks)

    def warn_of_copies(self) -> None:
        """Warn where the tasks' folders hold copies of the shards, and no links."""
        task_folders.warn_of_copies(self.folder, self.manifest, self._files)

    def known_task(self, task: str) -> str:
        """Return `task`, if the checkpoint has it.

        Raises:
            CheckpointError: it has not.
        """
        if task in self.tasks:
            return task
        problem = Problem("task", repr(task), f"one of {', '.join(self.tasks)}")
        raise CheckpointError([problem], str(self.folder))

    def tensors(self, task: str, device: str | torch.device = "cpu") -> TaskTensors:
        """Return the tensors of one task by their ordinary names, each made when it is asked for.

        Dense tensors are loaded once for each device and kept as long as the checkpoint is: all
        tasks that share one get the same object. On the CPU its storage is the mapped file, so that
        what is not used takes no memory, and writing to it changes no file. A tensor of a masked
        block is reconstructed at every access and is the caller's own.

        Raises:
            CheckpointError: the checkpoint has no such task.
        """
        return TaskTensors(self, self.known_task(task), torch.device(device))

    def load(self, place: Place, name: str, device: torch.device = _CPU) -> Tensor:
        """Return a tensor as the files hold it, loaded once for each device."""
        key = (place, name, device)
        if key not in self._loaded:
            self._loaded[key] = self.read(place, name).to(device)
        return self._loaded[key]

    def read(self, place: Place, name: str) -> Tensor:
        """Return a tensor as the files hold it, on the CPU; it is not kept."""
        return self.file(place, name).tensor(name)

    def file(self, place: Place, name: str) -> StoredFile:
        """Return the file of a tensor."""
        return self._places[place][name]


class TaskTensors(Mapping[str, Tensor]):
    """See `Checkpoint.tensors`. Names come in the order of the manifest."""

    def __init__(self, checkpoint: Checkpoint, task: str, device: torch.device):
        self._checkpoint, self._device = checkpoint, device
        self._sources: dict[str, Place | MaskedTensor] = {}
        for block in checkpoint.manifest.blocks:
            group = next(group for group in block.groups if task in group.tasks)
            self._sources.update(sources(block.name, block.shapes, group, task, group.rescale))
        for entry in checkpoint.manifest.private:
            if entry.task == task:
                own = Place(DENSE, (task,))
                self._sources.update({tensor.name: own for tensor in entry.tensors})

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        if isinstance(source, Place):
            return self._checkpoint.load(source, name, self._device)
        return source.reconstructed(name, self._checkpoint.read, self._device)

    def is_stored(self, name: str) -> bool:
        """Return whether the files hold the tensor as it is: every access gives the same one."""
        return isinstance(self._sources[name], Place)

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor for which `is_stored`, under its name."""
        place = self._sources[name]
        assert isinstance(place, Place)
        return self._checkpoint.file(place, name).path

    def entry(self, name: str) -> Entry:
        """Return dtype and shape of a tensor without reading it."""
        source = self._sources[name]
        place = source if isinstance(source, Place) else source.unified
        header = self._checkpoint.file(place, name).headers[name]
        return Entry(name, header.dtype, tuple(header.shape), header.nbytes)
