"""What makes a folder of weights a model: configuration, tokenizer, and the like."""

from __future__ import annotations

import json
from pathlib import Path

from mergekit_ext.model_files import companions, copy

_DTYPE_KEYS = ("dtype", "torch_dtype")


def copy_model_files(source: Path, target: Path, dtype: str | None) -> None:
    """Copy what makes `source` a model beside its weights; write `dtype` in the configuration."""
    copy(source, target, companions(source))
    if dtype is not None:
        _set_dtype(target / "config.json", dtype)


def explain_masks(folder: Path) -> None:
    """Say in a task's folder that holds no weights where they are."""
    task = folder.name
    (folder / "README.md").write_text(
        f"""# {task}

This folder has no weights: those of `{task}` are stored as masks over a vector that it shares with
other tasks, in `../shards/`. Load the model with

    from mergekit_ext import flexmerge
    model = flexmerge.load("..", task="{task}")

(the path is that of the folder above), or write it as an ordinary checkpoint with

    mergekit-ext export .. {task} OUT
""",
        encoding="utf-8",
    )


def _set_dtype(path: Path, dtype: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    present = [key for key in _DTYPE_KEYS if key in content] or [_DTYPE_KEYS[0]]
    content.update(dict.fromkeys(present, dtype))
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
