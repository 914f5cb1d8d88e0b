"""Read a FlexMerge checkpoint: docs/flexmerge-format.md, "What a reader must check"."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from mergekit_ext.errors import MOST_SHOWN, CheckpointError, Problem
from mergekit_ext.flexmerge import task_folders
from mergekit_ext.flexmerge.checkpoint import Checkpoint
from mergekit_ext.flexmerge.contents import content_problems
from mergekit_ext.flexmerge.manifest import ShardFile, read_manifest
from mergekit_ext.flexmerge.stored import RefusedError, StoredFile


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
        problems = list(content_problems(manifest, ((f.file, f.headers) for f in files)))
        if verify:
            problems += task_folders.problems(root, manifest, files)
    if problems:
        raise CheckpointError(islice(problems, MOST_SHOWN), str(folder))
    return Checkpoint(root, manifest, files)


def _opened(root: Path, file: ShardFile, verify: bool) -> StoredFile | Problem:
    try:
        return StoredFile(root, file, verify)
    except RefusedError as refused:
        return refused.problem
