"""What lies at the place of an output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

Digests = Mapping[str, str]

_INDEX = "model.safetensors.index.json"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an output, by its path; staging directories are no part of it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {str(path.relative_to(folder)): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not name.startswith(".")
    }


def expected(old: Digests, new: Digests) -> dict[str, str]:
    """The files after a merge into a folder: weights give way, other files stay."""
    kept = {n: d for n, d in old.items() if ".safetensors" not in n}
    return {**kept, **new}


def state(out: Path, old: Digests, wanted: Digests) -> str:
    """After a kill ``nothing``, ``old``, ``new``, ``incomplete`` (does not load), ``wrong``."""
    found = digests(out) if out.exists() else {}
    if not found:
        return "nothing"
    if found in (old, wanted):
        return "old" if found == old else "new"
    return "wrong" if _loads(out) else "incomplete"


def _loads(out: Path) -> bool:
    """Whether some reader would take the folder for a model, an adapter or a FlexMerge."""
    if any((out / name).exists() for name in ("flexmerge.json", "adapter_model.safetensors")):
        return True
    if not (out / "config.json").exists():
        return False
    if (out / "model.safetensors").exists():
        return True
    try:
        named = json.loads((out / _INDEX).read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError):
        return False
    return all((out / name).exists() for name in named)
