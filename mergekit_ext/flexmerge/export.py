"""One task of a FlexMerge checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.errors import CheckpointError, Problem
from mergekit_ext.flexmerge.files import RefusedError, regular_file
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.io.model_files import companions
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


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Weights in shards, under temporary names until their number is known."""
    parts: list[dict[str, int]] = []
    for shard in _shards(tensors, shard_bytes):
        # A tensor may be a view of the mapped file, or of another tensor.
        content = {name: tensor.contiguous() for name, tensor in shard.items()}
        save_file(content, folder / _part(len(parts)), metadata={"format": "pt"})
        parts.append({name: tensor.nbytes for name, tensor in content.items()})
    if len(parts) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(parts):
        final = f"model-{index + 1:05}-of-{len(parts):05}.safetensors"
        (folder / _part(index)).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    content = {
        "metadata": {"total_size": sum(sum(names.values()) for names in parts)},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _part(index: int) -> str:
    return f"part-{index}"


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name in tensors:
        tensor = tensors[name]
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    # A model without any tensor is one empty shard.
    yield shard


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
    except RefusedError as refused:
        return refused.problem
