"""The files of a checkpoint: shards, links to them in the tasks' folders, and what is beside them.

Every file is checked before anything in it is used. The manifest has the digests of shards and of
the files beside weights; a checkpoint that is one model has such files in its own folder too.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_ext.errors import CheckpointError, FileError, MergeWarning, Problem, attempted, warn
from mergekit_ext.flexmerge.manifest import Manifest, ShardFile
from mergekit_ext.io.headers import TensorHeader, read_safetensors
from mergekit_ext.io.model_files import companions, is_weights
from mergekit_ext.io.planned_files import INDEX, PlannedFile, weight_names, write_index

_DAMAGED = "Copy or download the file again."
_EDITED = "If you changed it yourself, load without `verify` (--no-verify)."
_CHUNK = 1 << 22
_GIT_DIGITS = 40


class StoredFile:
    """A shard in `root`, a resolved folder, as the manifest says; raises `CheckpointError`."""

    def __init__(self, root: Path, file: ShardFile, verify: bool = False):
        self.file = file
        self.path = regular_file(root, file.path, file.sha256, file.bytes, verify)
        try:
            self.headers: Mapping[str, TensorHeader] = read_safetensors(self.path)
            # Memory-mapped: what is not used is not read.
            self._open: Any = safe_open(self.path, framework="pt")
        except FileError as error:
            problem = replace(error.problem, where=file.path)
            raise CheckpointError([problem], str(root)) from None

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU; its storage is the mapped file."""
        try:
            tensor: Tensor = self._open.get_tensor(name)
        except SafetensorError as error:
            problem = Problem(f"{self.file.path}: {name}", str(error), "a dtype that torch has")
            raise CheckpointError([problem], str(self.path)) from None
        return tensor


def regular_file(
    root: Path, path: str, sha256: str | None = None, count: int | None = None, verify: bool = False
) -> Path:
    """Return the file that `path` names inside of `root`, a resolved folder, links resolved.

    In the Hub's cache files are links to blobs beside the snapshots. Such a link is followed when
    its content has the digest that the checkpoint gives it, or else the blob is called after.
    """
    expected, remedy = "a file", _DAMAGED
    try:
        resolved = (root / path).resolve(strict=True)
        size, mode = resolved.stat().st_size, resolved.stat().st_mode
        blob = root.parent.name == "snapshots" and resolved.parent == root.parent.parent / "blobs"
        digest = sha256 or resolved.name
        git = len(digest) == _GIT_DIGITS
        start = hashlib.sha1(b"blob %d\0" % size) if git else hashlib.sha256()
        if not blob and not resolved.is_relative_to(root):
            found, expected = f"a link to {resolved}, outside of the checkpoint", "a file inside"
            remedy = "Do not use the checkpoint unless you know who made it."
        elif not stat.S_ISREG(mode):
            found, expected = "something that is not a file", "a regular file"
        elif count not in (None, size):
            found, expected = f"{size} bytes", f"{count} bytes"
        elif (blob or verify) and (content := digest_of(resolved, start)) != digest:
            found, expected = f"{'Git digest' if git else 'SHA-256'} {content}", digest
        else:
            return resolved
    except (OSError, RuntimeError, ValueError) as error:
        # Before Python 3.13 a loop of links is a RuntimeError.
        found = f"no file ({error})"
    raise CheckpointError([Problem(path, found, expected, remedy)], str(root))


def digest_of(path: Path, digest: Any = None) -> str:
    """Return the SHA-256 of a file, or the value of another digest that has been started."""
    digest = digest or hashlib.sha256()
    piece = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def link_model(folder: Path, home: Path, files: Sequence[PlannedFile]) -> None:
    """Make `home` a Hugging Face checkpoint of files in `folder`: links and an index."""
    names = weight_names(len(files), numbered=True)
    for name, file in zip(names, files, strict=True):
        _link_file(folder / file.path, home / name)
    write_index(home, [(n, file.entries) for n, file in zip(names, files, strict=True)])


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
    names = [name for home in _homes(root, tasks) for name in _files(home, root)]
    return {name: digest_of(root / name) for name in names}


def problems(root: Path, manifest: Manifest, shards: Sequence[StoredFile]) -> Iterator[Problem]:
    """Yield every file of the folders that is not as it was written; `shards` are verified."""
    known = manifest.task_files
    _, refused = attempted(lambda item: regular_file(root, *item, verify=True), known.items())
    # A file that is missing was not edited.
    yield from (replace(p, remedy=_EDITED) if (root / p.where).exists() else p for p in refused)
    ordinary = {"", *(task.name for task in manifest.tasks if task.ordinary)}
    for home in _homes(root, [task.name for task in manifest.tasks]):
        for name in _files(home, root):
            if name not in known:
                yield Problem(name, "a file that was added later", "none", _EDITED)
        task = home.relative_to(root).name
        dense = [s for s in shards if s.file.kind == "dense" and task in ("", *s.file.tasks)]
        wanted = {shard.file.sha256: shard.file.path for shard in dense}
        # A link to a shard is not read again.
        read = {_inode(shard.path): shard.file.sha256 for shard in dense}
        found = {path: read.get(_inode(path)) or digest_of(path) for path in _shards(home)}
        for path, digest in found.items():
            if digest not in wanted:
                name = path.relative_to(root).as_posix()
                yield Problem(name, "weights of other content", "a copy of a shard", _EDITED)
        for digest, name in wanted.items():
            if task in ordinary and digest not in found.values():
                yield Problem(task or ".", f"no link to {name}", "one, as its index says", _EDITED)


def warn_of_copies(root: Path, tasks: Sequence[str], shards: Sequence[StoredFile]) -> None:
    """Warn of folders whose weights are copies of the shards: how many bytes that takes."""
    homes = _homes(root, tasks)
    sizes = {_inode(path): path.stat().st_size for home in homes for path in _shards(home)}
    wasted = sum(sizes[inode] for inode in sizes.keys() - {_inode(s.path) for s in shards})
    if wasted:
        text = (
            f"{root}: the weights in the tasks' folders are copies of those in `shards`, not "
            f"links: {wasted:,} bytes more on the disk. Copy checkpoints with `cp -a`, "
            "`rsync -aH` or tar, which keep links."
        )
        warn(MergeWarning(text))


def _inode(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _homes(root: Path, tasks: Sequence[str]) -> list[Path]:
    homes = [root / task for task in tasks if (root / task).is_dir()]
    return [*homes, root] if (root / INDEX).is_file() else homes


def _files(home: Path, root: Path) -> list[str]:
    """Return all that a reader may take for a part of the model, but for links to shards."""
    weights = {path.name for path in home.iterdir() if path.is_file() and is_weights(path)}
    others = sorted(weights - {path.name for path in _shards(home)})
    return [(home / name).relative_to(root).as_posix() for name in (*companions(home), *others)]


def _shards(home: Path) -> list[Path]:
    return [path for path in sorted(home.glob("*.safetensors")) if path.is_file()]
