"""Folders of files that several models share: Hugging Face checkpoints made of links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mergekit_ext.io.planned import Entry

INDEX = "model.safetensors.index.json"


def link_model(folder: Path, home: Path, files: Sequence[tuple[str, Sequence[Entry]]]) -> None:
    """Make `home` a Hugging Face checkpoint of these files: links and an index."""
    weights, total = {}, 0
    for number, (path, entries) in enumerate(files, 1):
        local = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _link_file(folder / path, home / local)
        weights.update({entry.name: local for entry in entries})
        total += sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (home / INDEX).write_text(text, encoding="utf-8")


def _link_file(target: Path, link: Path) -> None:
    with suppress(OSError):
        os.link(target, link)
        return
    with suppress(OSError):
        link.symlink_to(os.path.relpath(target, link.parent))
        return
    shutil.copyfile(target, link)
