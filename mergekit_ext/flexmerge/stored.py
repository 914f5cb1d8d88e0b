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
from mergekit_ext.headers import HeaderError, TensorHeader, read_safetensors

_DAMAGED = "Copy or download the file again."
_CHUNK = 1 << 22


class RefusedError(Exception):
    """A file that must not be used, and why."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem


class StoredFile:
    """A shard whose place, length and header are those of the manifest.

    Attributes:
        path: where it is, links resolved.
        headers: name, dtype and shape of its tensors.

    Raises:
        RefusedError: it is something else.
    """

    def __init__(self, root: Path, file: ShardFile):
        self.file = file
        self.path = regular_file(root, file.path, file.path)
        length = self.path.stat().st_size
        if length != file.bytes:
            raise RefusedError(
                Problem(file.path, f"{length} bytes", f"{file.bytes} bytes", _DAMAGED)
            )
        try:
            self.headers: Mapping[str, TensorHeader] = read_safetensors(self.path)
            # Memory-mapped: what is not used is not read.
            opened: Any = safe_open(self.path, framework="pt")
            metadata = opened.metadata() or {}
        except HeaderError as error:
            raise RefusedError(
                Problem(file.path, error.found, error.expected, error.remedy)
            ) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise RefusedError(
                Problem(file.path, str(error), "a safetensors file", _DAMAGED)
            ) from None
        self._open = opened
        if metadata.get("format") != "pt":
            raise RefusedError(
                Problem(file.path, f"metadata {metadata}", 'metadata with "format": "pt"')
            )

    def verify(self) -> None:
        """Compare the content with the manifest's digest.

        Raises:
            RefusedError: they differ, or the file cannot be read.
        """
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as content:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise RefusedError(
                Problem(self.file.path, f"an error ({error})", "a readable file")
            ) from None
        if digest.hexdigest() != self.file.sha256:
            raise RefusedError(
                Problem(self.file.path, f"SHA-256 {digest.hexdigest()}", self.file.sha256, _DAMAGED)
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU; its storage is the mapped file.

        Raises:
            CheckpointError: it is of a dtype that torch does not have.
        """
        try:
            tensor: Tensor = self._open.get_tensor(name)
        except SafetensorError as error:
            problem = Problem(f"{self.file.path}: {name}", str(error), "a dtype that torch has")
            raise CheckpointError([problem], str(self.path)) from None
        return tensor


def regular_file(root: Path, path: str, where: str) -> Path:
    """The file that `path` names inside of `root`, links resolved.

    Args:
        root: a folder, resolved.
        path: relative to it.
        where: what messages call it.

    Raises:
        RefusedError: there is none, it is not a regular file, or it lies elsewhere.
    """
    try:
        resolved = (root / path).resolve(strict=True)
        mode = resolved.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:
        # Before Python 3.13 a loop of links is a RuntimeError.
        raise RefusedError(Problem(where, f"no file ({error})", "a file", _DAMAGED)) from None
    if not resolved.is_relative_to(root):
        raise RefusedError(
            Problem(
                where,
                f"a link to {resolved}, outside of the checkpoint",
                "a file inside of it",
                "Do not use the checkpoint unless you know who made it. A copy from the Hub's "
                "cache has such links: download it with `local_dir`.",
            )
        )
    if not stat.S_ISREG(mode):
        raise RefusedError(Problem(where, "something that is not a file", "a regular file"))
    return resolved
