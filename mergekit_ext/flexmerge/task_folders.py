"""The tasks' folders: links to shards, and files beside them that the manifest knows by digest.

A checkpoint that is one model besides has such files in its own folder too.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mergekit_ext.errors import CheckpointError, MergeWarning, Problem
from mergekit_ext.flexmerge.files import (
    StoredFile,
    digest_of,
    regular_file,
    require_digest,
)
from mergekit_ext.flexmerge.manifest import DENSE, Manifest
from mergekit_ext.io.model_files import companions, is_weights
from mergekit_ext.io.planned import INDEX, Entry, weight_names, write_index

_SHARD = ".safetensors"
_REMEDY = "If you changed it yourself, load without `verify` (--no-verify)."


def link_model(folder: Path, home: Path, files: Sequence[tuple[str, Sequence[Entry]]]) -> None:
    """Make `home` a Hugging Face checkpoint of these files: links and an index."""
    names = weight_names(len(files), numbered=True)
    for name, (path, _) in zip(names, files, strict=True):
        _link_file(folder / path, home / name)
    write_index(home, [(name, entries) for name, (_, entries) in zip(names, files, strict=True)])


def _link_file(target: Path, link: Path) -> None:
    with suppress(OSError):
        os.link(target, link)
        return
    with suppress(OSError):
        link.symlink_to(os.path.relpath(target, link.parent))
        return
    shutil.copyfile(target, link)


def described(root: Path, tasks: Sequence[str]) -> dict[str, str]:
    """Return the digests of the files beside weights, for the manifest."""
    return {
        name: digest_of(root / name) for home in _homes(root, tasks) for name in _files(home, root)
    }


def problems(root: Path, manifest: Manifest, shards: Sequence[StoredFile]) -> Iterator[Problem]:
    """Yield every file of the folders that is not as it was written.

    Args:
        root: the checkpoint's folder, resolved.
        manifest: one of an older version knows nothing but weights.
        shards: opened and verified.
    """
    known = manifest.task_files
    for name, digest in known.items():
        yield from _problem(root, name, digest)
    ordinary = {"", *(task.name for task in manifest.tasks if task.ordinary)}
    for home in _homes(root, [task.name for task in manifest.tasks]):
        added = [name for name in _files(home, root) if known and name not in known]
        for name in added:
            yield Problem(name, "a file that was added later", "none", _REMEDY)
        task = home.relative_to(root).name
        wanted = [s for s in shards if s.file.kind == DENSE and task in ("", *s.file.tasks)]
        left = {shard.file.sha256: shard.file.path for shard in wanted if task in ordinary}
        for path in _shards(home):
            digest = _digest_of(path, wanted)
            left.pop(digest, None)
            if digest not in {shard.file.sha256 for shard in wanted}:
                name = path.relative_to(root).as_posix()
                yield Problem(name, "weights of other content", "a copy of a shard", _REMEDY)
        for name in left.values():
            yield Problem(task or ".", f"no link to {name}", "one, as its index says", _REMEDY)


def _digest_of(path: Path, shards: Sequence[StoredFile]) -> str:
    """Return the digest of a file, which is not read where it is a link to one of `shards`."""
    linked = (shard.file.sha256 for shard in shards if path.samefile(shard.path))
    return next(linked, None) or digest_of(path)


def warn_of_copies(root: Path, manifest: Manifest, shards: Sequence[StoredFile]) -> None:
    """Warn of folders whose weights are copies of the shards: how many bytes that takes."""
    seen = {(state.st_dev, state.st_ino) for state in (shard.path.stat() for shard in shards)}
    wasted = 0
    for home in _homes(root, [task.name for task in manifest.tasks]):
        for path in _shards(home):
            state = path.stat()
            if (state.st_dev, state.st_ino) not in seen:
                seen.add((state.st_dev, state.st_ino))
                wasted += state.st_size
    if wasted:
        warnings.warn(
            MergeWarning(
                f"{root}: the weights in the tasks' folders are copies of those in `shards`, not "
                f"links: {wasted:,} bytes more on the disk. Copy checkpoints with `cp -a`, "
                "`rsync -aH` or tar, which keep links."
            ),
            stacklevel=3,
        )


def _homes(root: Path, tasks: Sequence[str]) -> list[Path]:
    """Return the folders that are checkpoints by themselves, or would be but for masks."""
    homes = [root / task for task in tasks if (root / task).is_dir()]
    return [*homes, root] if (root / INDEX).is_file() else homes


def _files(home: Path, root: Path) -> list[str]:
    """Return all that a reader may take for a part of the model, but for links to shards."""
    others = [path.name for path in _weights(home) if path.suffix != _SHARD]
    return [(home / name).relative_to(root).as_posix() for name in (*companions(home), *others)]


def _shards(home: Path) -> list[Path]:
    return [path for path in _weights(home) if path.suffix == _SHARD]


def _weights(home: Path) -> list[Path]:
    """Return weights and indexes of the model itself: those of its modules lie in folders."""
    return [path for path in sorted(home.iterdir()) if path.is_file() and is_weights(path)]


def _problem(root: Path, name: str, digest: str) -> Iterator[Problem]:
    if ".." in PurePosixPath(name).parts:
        yield Problem(name, "a path that climbs", "one inside of the checkpoint", _REMEDY)
        return
    try:
        path = regular_file(root, name, name, digest)
        if path.is_relative_to(root):
            require_digest(root, path, name, digest)
    except CheckpointError as refused:
        yield replace(refused.problems[0], remedy=_REMEDY)
