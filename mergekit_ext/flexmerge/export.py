"""One task of a FlexMerge checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.errors import CheckpointError, ConfigError, Problem
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.flexmerge.stored import RefusedError, regular_file
from mergekit_ext.io.durable import appear
from mergekit_ext.io.model_files import companions
from mergekit_ext.io.rooms import hidden_room

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
    target = Path(out).absolute()
    _check_target(target)
    checkpoint = open_checkpoint(path, verify)
    tensors = checkpoint.tensors(task)
    files = _companions(checkpoint.folder, task)
    with _appearing(target) as room:
        for name, source in files.items():
            (room / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, room / name)
        _write_weights(room, tensors, shard_bytes)
    checkpoint.warn_of_copies()


def _write_weights(room: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Weights in shards, under temporary names until their number is known."""
    parts: list[dict[str, int]] = []
    for shard in _shards(tensors, shard_bytes):
        # A tensor may be a view of the mapped file, or of another tensor.
        content = {name: tensor.contiguous() for name, tensor in shard.items()}
        save_file(content, room / _part(len(parts)), metadata={"format": "pt"})
        parts.append({name: tensor.nbytes for name, tensor in content.items()})
    if len(parts) == 1:
        (room / _part(0)).rename(room / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(parts):
        final = f"model-{index + 1:05}-of-{len(parts):05}.safetensors"
        (room / _part(index)).rename(room / final)
        weight_map.update(dict.fromkeys(names, final))
    content = {
        "metadata": {"total_size": sum(sum(names.values()) for names in parts)},
        "weight_map": weight_map,
    }
    (room / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


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


def _check_target(target: Path) -> None:
    expected = "a folder that does not exist or is empty"
    found = None
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            found = f"{target}, which is not a folder"
        elif target.is_dir() and any(target.iterdir()):
            found = f"{target}, which is not empty"
    except (OSError, ValueError) as error:  # too long, or no name of a file
        found = f"{target} ({getattr(error, 'strerror', None) or error})"
    if found is not None:
        problem = Problem("OUT", found, expected, "Choose another name.")
        raise ConfigError([problem], "this export")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target`; after an exception nothing is left."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        outer = hidden_room(target, target.parent)
        with ExitStack() as stack:
            # Not the hidden folder itself, which only its owner may read.
            room = stack.enter_context(outer) / target.name
            room.mkdir()
            stack = stack.pop_all()
    except OSError as error:
        problem = Problem("OUT", f"{target} ({error.strerror})", "a place that can be written")
        raise ConfigError([problem], "this export") from None
    with stack:
        yield room
        if target.is_dir():
            target.rmdir()
        appear(room, target)
