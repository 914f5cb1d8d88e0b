"""What decides an output: a merge that was killed is continued only if all of it is the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath

from mergekit_ext.errors import MergeError
from mergekit_ext.host.adapters.fitted import VARIABLE as ADAPTERS_VARIABLE
from mergekit_ext.host.checks.hub import cached_folder
from mergekit_ext.host.inputs import files_of
from mergekit_ext.io.model_files import may_be_hub_name

# What says how a merge runs and is shown, and nothing about its result.
_NO_EFFECT = {"quiet", "verbosity", "num_threads", "async_write", "write_threads", "lazy_unpickle"}
_PACKAGES = ("mergekit-ext", "mergekit", "torch", "transformers", "tokenizers")
_PROSE = {".md"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def identity(source: str, options: Any, models: Iterable[Any]) -> dict[str, str]:
    """Return the parts of a merge's identity, by names that a user understands.

    Args:
        source: the text of the configuration.
        options: mergekit's.
        models: every model that is read (`models_of`). Local ones are known by the length and the
            time of change of their files, those of the Hub by their commit.
    """
    given = {k: v for k, v in options.model_dump().items() if k not in _NO_EFFECT}
    # Several processes have devices of one kind.
    given["device"] = str(options.device).partition(":")[0]
    parts = [part for model in models for part in (model.model, model.lora) if part is not None]
    inputs = sorted({(part.path, part.revision or "") for part in parts})
    return {
        "configuration": _digest(source),
        "options": _digest(given, os.environ.get(ADAPTERS_VARIABLE, "")),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES),
        **{f"input {path}": _input(path, at, options) for path, at in inputs},
    }


def weights_of(models: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Return length and time of change of every local file of weights, by its path.

    They are compared at the end of a merge; other files of a model may come and go meanwhile.
    """
    paths = {part.path for model in models for part in (model.model, model.lora) if part}
    return {
        str(file): _state(file)
        for folder in map(Path, sorted(paths))
        if folder.is_dir()
        for file in files_of(folder)
        if file.suffix in _WEIGHTS
    }


def require_unchanged(before: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an output of inputs that were written to meanwhile.

    Raises:
        MergeError: naming the files that are not as `weights_of` found them.
    """
    files = [(Path(path), found) for path, found in before.items()]
    if changed := [str(file) for file, found in files if file.exists() and _state(file) != found]:
        raise MergeError(
            f"{', '.join(changed)}: written to while it was merged; the output would be of two "
            "versions. Merge again when no process writes to it."
        )


def _input(path: str, revision: str, options: Any) -> str:
    folder = Path(path)
    if folder.is_dir():
        # Stories about a model may be rewritten while it is merged.
        kept = (f for f in files_of(folder) if f.suffix not in _PROSE)
        files = [(str(f.relative_to(folder)), *_state(f)) for f in kept if f.name[0] != "."]
        return _digest(files)
    if not may_be_hub_name(path):  # of a tokenizer: mergekit will say it
        return ""
    place = ModelPath(path=path, revision=revision or None)
    snapshot = cached_folder(place, options)
    # The folder's name is the commit; where the cache lies is of no effect.
    return _digest(snapshot.name if snapshot is not None else "", revision)


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
