"""One task of a FlexMerge checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from mergekit_ext.errors import CheckpointError, Problem
from mergekit_ext.flexmerge.files import regular_file
from mergekit_ext.flexmerge.reader import TaskTensors, open_checkpoint
from mergekit_ext.io.model_files import companions
from mergekit_ext.io.planned import split, weight_names, write_index
from mergekit_ext.io.staging import new_folder

_SHARD_BYTES = 5_000_000_000


def export(
    path: str | os.PathLike[str],
    task: str,
    out: str | os.PathLike[str],
    *,
    verify: bool = True,
    shard_bytes: int = _SHARD_BYTES,
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
    """
    checkpoint = open_checkpoint(path, verify)
    tensors = checkpoint.tensors(task)
    files = _companions(checkpoint.folder, task)
    with new_folder(out, "this export", "OUT") as folder:
        for name, source in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
        _write_weights(folder, tensors, shard_bytes)
    checkpoint.warn_of_copies()


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


def _companions(root: Path, task: str) -> dict[str, Path]:
    """Return the files of a task's folder beside weights and card: their names and places."""
    names = companions(root / task)
    found = {
        name: _place(root, f"{task}/{name}") for name in dict.fromkeys(["config.json", *names])
    }
    problems = [place for place in found.values() if isinstance(place, Problem)]
    if problems:
        raise CheckpointError(problems, str(root))
    return {name: place for name, place in found.items() if isinstance(place, Path)}


def _place(root: Path, name: str) -> Path | Problem:
    try:
        return regular_file(root, name, name)
    except CheckpointError as refused:
        return refused.problems[0]
