"""Outputs appear whole: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")


@contextmanager
def staged(out_path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to write in, of the same name as `out_path`, which it becomes at the end.

    After an exception nothing is left. If `out_path` is a folder with files in it, as after an
    earlier merge, its weights are replaced as mergekit would, and other files stay.
    """
    target = Path(out_path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same folder, so that the rename stays on one file system.
    room = Path(
        tempfile.mkdtemp(prefix=f".{target.name}-", suffix="-incomplete", dir=target.parent)
    )
    try:
        written = room / target.name
        written.mkdir()
        yield written
        _put(written, target)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _put(written: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        # Replaces an empty folder as well.
        written.replace(target)
        return
    fresh = {path.name for path in written.iterdir()}
    for pattern in (*_WEIGHTS, *_PICKLES):
        for old in target.glob(pattern):
            # An index or a shard that the new model does not have would be read with it.
            if old.name not in fresh:
                old.unlink()
    for path in sorted(written.iterdir()):
        destination = target / path.name
        if destination.is_dir():
            shutil.rmtree(destination)
        path.replace(destination)


def shards(folder: Path) -> Iterator[Path]:
    """The files of weights in `folder`, in order."""
    for pattern in (_WEIGHTS[0], _PICKLES[0]):
        yield from sorted(folder.glob(pattern))
