"""Read a FlexMerge checkpoint: docs/flexmerge-format.md, "What a reader must check".

A task is read tensor by tensor, or written as an ordinary Hugging Face folder.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.errors import (
    MOST_SHOWN,
    CheckpointError,
    ConfigError,
    Problem,
    attempted,
    did_you_mean,
    require,
)
from mergekit_ext.flexmerge import files as on_disk
from mergekit_ext.flexmerge.files import StoredFile, regular_file
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.manifest import FILE_NAME, Manifest, ShardFile, read_manifest
from mergekit_ext.flexmerge.stored import Made, MaskedTensor, Place, ResidualTensor, sources, stored
from mergekit_ext.io.documents import StrPath
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.hub import folder_of
from mergekit_ext.io.model_files import classes_of, companions
from mergekit_ext.io.planned_files import split, weight_names, write_index
from mergekit_ext.io.staging import new_folder
from mergekit_ext.report.card import CARD, model_card


def located(path: StrPath, task: str | None = None, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint; one on the Hub is downloaded, or what a task needs of it.

    Raises:
        CheckpointError: there is none, or it cannot be downloaded.
    """
    try:
        folder = folder_of(path, revision, [FILE_NAME])
        if os.path.isdir(os.path.expanduser(path)):
            return folder
        shards = [file.path for file in read_manifest(folder).files if task in file.tasks]
        wanted = ["*"] if task is None else [f"{task}/*", *shards]
        return folder_of(path, revision, [FILE_NAME, *wanted])
    except ConfigError as error:
        raise CheckpointError(error.problems, os.fspath(path)) from None


def open_checkpoint(folder: StrPath, verify: bool = False, task: str | None = None) -> "Checkpoint":
    """Check a checkpoint, or what a `task` needs of it; open its files, warn of copies of them.

    With `verify` every file is compared with its digest, those in the tasks' folders too.
    """
    manifest = read_manifest(folder)
    _require_task(manifest, task, folder)
    root = Path(folder).resolve()
    wanted = [file for file in manifest.files if task is None or task in file.tasks]
    files, problems = attempted(lambda file: StoredFile(root, file, verify), wanted)
    # Without a file its tensors would all be missing.
    if not problems:
        problems = list(islice(_content_problems(manifest, files, task), MOST_SHOWN))
        if verify:
            problems += on_disk.problems(root, manifest, files)
    require(islice(problems, MOST_SHOWN), str(folder), CheckpointError)
    names = [each.name for each in manifest.tasks]
    on_disk.warn_of_copies(root, names if task is None else [task], files)
    return Checkpoint(root, manifest, files)


def _place_of(file: ShardFile) -> Place:
    """Return where a file's tensors are. Those of the base are one set, whatever tasks it names."""
    return Place(file.kind, () if file.kind == "base" else file.tasks)


def _require_task(manifest: Manifest, task: str | None, folder: StrPath) -> None:
    names = [each.name for each in manifest.tasks]
    if task not in (None, *names):
        remedy = did_you_mean(task, names, listed=True, otherwise="")
        problem = Problem("task", repr(task), f"one of {', '.join(names)}", remedy)
        raise CheckpointError([problem], str(folder))


def _content_problems(
    manifest: Manifest, files: Sequence[StoredFile], task: str | None
) -> Iterator[Problem]:
    """Yield what the files hold and should not, and what they lack: all, or those of a `task`."""
    expected = {
        (place, name): shape
        for block in manifest.blocks
        for place, name, shape in stored(block.name, block.shapes, block.groups)
    }
    for entry in manifest.private:
        for tensor in entry.tensors:
            expected[Place("dense", (entry.task,)), tensor.name] = tensor.shape
    if task is not None:
        expected = {key: s for key, s in expected.items() if task in (key[0].tasks or [task])}
    dtypes = {"masks": ["U8"], **{kind: [*FLOATING] for kind in ("base", "unified", "factors")}}
    found: dict[tuple[Place, str], str] = {}
    for file in files:
        for name, header in file.headers.items():
            path, key = file.file.path, (_place_of(file.file), name)
            where = f"{path}, tensor {name}"
            if key not in expected:
                other = "a tensor that is not called for"
                yield Problem(where, other, "tensors of the manifest's blocks")
                continue
            if key in found:
                yield Problem(where, f"one, which {found[key]} holds too", "each in one file")
            found[key] = path
            if header.shape != expected[key]:
                yield Problem(where, f"shape {list(header.shape)}", f"{list(expected[key])}")
            if header.dtype not in (known := dtypes.get(file.file.kind, [header.dtype])):
                yield Problem(where, f"dtype {header.dtype}", " or ".join(known))
    for place, name in (key for key in expected if key not in found):
        yield Problem(name, f"nothing in {place}", "every tensor of the manifest's blocks")
    total = sum(header.nbytes for file in files for header in file.headers.values())
    if task is None and total != manifest.size.bytes:
        wanted = f"{total}, the bytes of all tensors in the files"
        yield Problem("size.bytes", f"{manifest.size.bytes}", wanted)


class Checkpoint:
    """A checkpoint that `open_checkpoint` has checked; `files` has the file of each tensor."""

    def __init__(self, folder: Path, manifest: Manifest, files: Sequence[StoredFile]):
        self.folder, self.manifest = folder, manifest
        self.tasks = tuple(task.name for task in manifest.tasks)
        self.files = {(_place_of(file.file), name): file for file in files for name in file.headers}
        self._read: dict[tuple[Place, str], Tensor] = {}

    def tensors(self, task: str) -> "TaskTensors":
        """Return the tensors of one task by their ordinary names, each made when it is asked for.

        All tasks that share a dense tensor get the same object. Its storage is the mapped file, so
        that what is not used takes no memory, and writing to it changes no file. A tensor of a
        masked or residual block is reconstructed at every access and is the caller's own.
        """
        _require_task(self.manifest, task, self.folder)
        return TaskTensors(self, task)

    def read(self, place: Place, name: str) -> Tensor:
        """Return a tensor as the files hold it, on the CPU: always the same object."""
        if (place, name) not in self._read:
            self._read[place, name] = self.files[place, name].tensor(name)
        return self._read[place, name]


class TaskTensors(Mapping[str, Tensor]):
    """See `Checkpoint.tensors`. Names come in the order of the manifest."""

    def __init__(self, checkpoint: Checkpoint, task: str):
        self._checkpoint = checkpoint
        self._sources: dict[str, Place | Made] = {}
        for block in checkpoint.manifest.blocks:
            group = next(group for group in block.groups if task in group.tasks)
            self._sources.update(sources(block.name, block.shapes, group, task, group.rescale))
        for entry in checkpoint.manifest.private:
            if entry.task == task:
                own = Place("dense", (task,))
                self._sources.update({tensor.name: own for tensor in entry.tensors})

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        if isinstance(source, Place):
            return self._checkpoint.read(source, name)
        return source.reconstructed(name, self._checkpoint.read)

    def parts(self, name: str) -> tuple[Tensor, ...] | None:
        """Return theta_0, B and A of a tensor with a residual, as they are stored, or None.

        Where others have a residual and this task has not, B and A have rank 0.
        """
        source = self._sources[name]
        if not isinstance(source, ResidualTensor):
            return None
        parts = tuple(self._checkpoint.read(*key) for key in source.stored(name))
        if source.ranked:
            return parts
        (theta_0,) = parts
        return theta_0, theta_0.new_empty(len(theta_0), 0), theta_0.new_empty(0, theta_0[0].numel())

    def stored(self) -> Iterator[tuple[Tensor, StoredFile, str]]:
        """Yield tensors that are stored as they are, or as parts of a residual, with their places.

        A tensor is always the same object.
        """
        for name, source in self._sources.items():
            if isinstance(source, MaskedTensor):
                continue
            keys = [(source, name)] if isinstance(source, Place) else source.stored(name)
            for key in keys:
                yield self._checkpoint.read(*key), self._checkpoint.files[key], key[1]

    def entry(self, name: str) -> TensorHeader:
        """Return dtype and shape of a tensor without reading it."""
        source = self._sources[name]
        place = source if isinstance(source, Place) else source.unified
        return self._checkpoint.files[place, name].headers[name]


def export(
    path: StrPath, task: str, out: StrPath, *, verify: bool = True, shard_bytes: int = 5_000_000_000
) -> None:
    """Write one task as a folder that needs nothing of ours: weights, configuration, tokenizer.

    Dense tensors are copied, those of masked blocks reconstructed, one shard in memory at a time.

    Args:
        path: folder with ``flexmerge.json``.
        task: name of the task.
        out: a folder that does not exist or is empty; it appears when it is complete.
        verify: compare the files with their digests first.
        shard_bytes: a shard has no more, unless one tensor alone has.

    Raises:
        CheckpointError: the checkpoint is not as docs/flexmerge-format.md says, or has no such
            task.
        ConfigError: `out` cannot be written.

    Example:
        >>> mergekit_ext.export("out", "code", "code-alone")
    """
    checkpoint = open_checkpoint(path, verify)
    root, tensors = checkpoint.folder, checkpoint.tensors(task)
    names = list(dict.fromkeys(["config.json", *companions(root / task)]))
    sources, problems = attempted(lambda name: regular_file(root, f"{task}/{name}"), names)
    require(problems, str(root), CheckpointError)
    if Path(os.path.realpath(os.path.expanduser(out))).is_relative_to(root):
        expected = "a folder outside of the checkpoint"
        require([Problem("OUT", f"{out}, inside of it", expected)], "this export")
    with new_folder(out, "this export", "OUT") as folder:
        for name, source in zip(names, sources, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
        _write_weights(folder, tensors, shard_bytes)
        if card := model_card(*classes_of(folder), Path(out).name):
            (folder / CARD).write_text(card, encoding="utf-8")


def _write_weights(folder: Path, tensors: TaskTensors, shard_bytes: int) -> None:
    # A model without any tensor is one empty shard.
    shards = split(map(tensors.entry, tensors), shard_bytes) or [()]
    files = list(zip(weight_names(len(shards)), shards, strict=True))
    for name, entries in files:
        # A tensor may be a view of the mapped file, or of another tensor.
        content = {entry.name: tensors[entry.name].contiguous() for entry in entries}
        save_file(content, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        write_index(folder, files)
