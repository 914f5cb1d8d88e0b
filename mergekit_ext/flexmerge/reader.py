"""Read a FlexMerge checkpoint: docs/flexmerge-format.md, "What a reader must check"."""

from __future__ import annotations

import os
from pathlib import Path

from mergekit_ext.errors import CheckpointError, Problem
from mergekit_ext.flexmerge import task_folders
from mergekit_ext.flexmerge.checkpoint import Checkpoint
from mergekit_ext.flexmerge.contents import content_problems
from mergekit_ext.flexmerge.manifest import FILE_NAME, Manifest, ShardFile
from mergekit_ext.flexmerge.parse import LARGEST, listed
from mergekit_ext.flexmerge.stored import RefusedError, StoredFile


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read ``flexmerge.json``; no other file is looked at.

    Raises:
        CheckpointError: it is missing, unreadable, or not a manifest (`Manifest.from_json`).
    """
    path = Path(folder) / FILE_NAME
    where = str(path)
    if not path.is_file():
        raise CheckpointError([_no_checkpoint(path)], str(folder))
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        problem = Problem(where, f"an error ({error})", "a manifest in UTF-8")
        raise CheckpointError([problem], str(folder)) from None
    if len(content) > LARGEST:
        problem = Problem(where, f"more than {LARGEST:,} bytes", f"{LARGEST:,} at most")
        raise CheckpointError([problem], str(folder))
    return Manifest.from_json(text, where)


def _no_checkpoint(path: Path) -> Problem:
    # Not `resolve`, which a loop of links stops.
    folder = Path(os.path.realpath(path.parent))
    remedy = "Give the folder that a `flexmerge` merge wrote; load other models with transformers."
    if (folder.parent / FILE_NAME).is_file():
        remedy = f"Give the folder above, {folder.parent}, and the task {folder.name!r}."
    return Problem(str(path), "no such file", "the manifest of a FlexMerge checkpoint", remedy)


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
    opened = [_opened(root, file, verify) for file in manifest.files]
    files = [result for result in opened if isinstance(result, StoredFile)]
    problems = [result for result in opened if isinstance(result, Problem)]
    # Without a file its tensors would all be missing.
    if not problems:
        problems = listed(content_problems(manifest, ((f.file, f.headers) for f in files)))
        if verify:
            problems += task_folders.problems(root, manifest, files)
    if problems:
        raise CheckpointError(listed(problems), str(folder))
    return Checkpoint(root, manifest, files)


def _opened(root: Path, file: ShardFile, verify: bool) -> StoredFile | Problem:
    try:
        return StoredFile(root, file, verify)
    except RefusedError as refused:
        return refused.problem
