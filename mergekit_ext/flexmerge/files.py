"""One file of a checkpoint on disk, checked before anything in it is used."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_ext.errors import CheckpointError, Problem
from mergekit_ext.flexmerge.manifest import ShardFile
from mergekit_ext.io.headers import HeaderError, TensorHeader, read_safetensors

_DAMAGED = "Copy or download the file again."
_CHUNK = 1 << 22
_GIT_DIGITS = 40


class StoredFile:
    """A shard whose place, length and header are those of the manifest.

    Attributes:
        path: where it is, links resolved.
        headers: name, dtype and shape of its tensors.

    Args:
        root: the checkpoint's folder, resolved.
        file: the manifest's entry.
        verify: also compare the content with the manifest's digest.

    Raises:
        CheckpointError: it is something else.
    """

    def __init__(self, root: Path, file: ShardFile, verify: bool = False):
        self.file = file
        self.path = regular_file(root, file.path, file.path, file.sha256)
        length = self.path.stat().st_size
        if length != file.bytes:
            raise _refused(root, file.path, f"{length} bytes", f"{file.bytes} bytes", _DAMAGED)
        try:
            self.headers: Mapping[str, TensorHeader] = read_safetensors(self.path)
            # Memory-mapped: what is not used is not read.
            opened: Any = safe_open(self.path, framework="pt")
            metadata = opened.metadata() or {}
        except HeaderError as error:
            raise _refused(root, file.path, error.found, error.expected, error.remedy) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise _refused(root, file.path, str(error), "a safetensors file", _DAMAGED) from None
        self._open = opened
        if metadata.get("format") != "pt":
            raise _refused(root, file.path, f"metadata {metadata}", 'metadata with "format": "pt"')
        if verify and self.path.is_relative_to(root):  # others have been compared
            require_digest(root, self.path, file.path, file.sha256)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU; its storage is the mapped file.

        Raises:
            CheckpointError: it is of a dtype that torch does not have.
        """
        try:
            tensor: Tensor = self._open.get_tensor(name)
        except SafetensorError as error:
            problem = Problem(f"{self.file.path}: {name}", str(error), "a dtype that torch has")
            raise CheckpointError([problem], str(self.path)) from None
        return tensor


def regular_file(root: Path, path: str, where: str, sha256: str | None = None) -> Path:
    """Return the file that `path` names inside of `root`, links resolved.

    In the Hub's cache files are links to blobs beside the snapshots. Such a link is followed when
    its content has the digest that the checkpoint gives it, or else the blob is called after.

    Args:
        root: a folder, resolved.
        path: relative to it.
        where: what messages call it.
        sha256: the digest of its content, where it is known.

    Raises:
        CheckpointError: there is none, it is not a regular file, or it lies elsewhere.
    """
    try:
        resolved = (root / path).resolve(strict=True)
        mode = resolved.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:
        # Before Python 3.13 a loop of links is a RuntimeError.
        raise _refused(root, where, f"no file ({error})", "a file", _DAMAGED) from None
    in_cache = root.parent.name == "snapshots"
    blob = in_cache and resolved.parent == root.parent.parent / "blobs"
    if not blob and not resolved.is_relative_to(root):
        found = f"a link to {resolved}, outside of the checkpoint"
        remedy = "Do not use the checkpoint unless you know who made it."
        raise _refused(root, where, found, "a file inside of it", remedy)
    if not stat.S_ISREG(mode):
        raise _refused(root, where, "something that is not a file", "a regular file")
    if blob:
        require_digest(root, resolved, where, sha256 or resolved.name)
    return resolved


def _refused(
    root: Path, where: str, found: str, expected: str, remedy: str = ""
) -> CheckpointError:
    return CheckpointError([Problem(where, found, expected, remedy)], str(root))


def require_digest(root: Path, path: Path, where: str, digest: str) -> None:
    """Compare the content of a file with its SHA-256, or with the digest that Git knows it by.

    Raises:
        CheckpointError: they differ, or the file cannot be read.
    """
    git = len(digest) == _GIT_DIGITS
    try:
        start = b"blob %d\0" % path.stat().st_size
        found = digest_of(path, hashlib.sha1(start)) if git else digest_of(path)
    except OSError as error:
        raise _refused(root, where, f"an error ({error})", "a readable file") from None
    if found != digest:
        name = "Git digest" if git else "SHA-256"
        raise _refused(root, where, f"{name} {found}", digest, _DAMAGED)


def digest_of(path: Path, digest: Any = None) -> str:
    """Return the SHA-256 of a file, or the value of another digest that has been started."""
    digest = digest or hashlib.sha256()
    piece = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    value: str = digest.hexdigest()
    return value
