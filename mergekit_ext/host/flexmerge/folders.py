"""What makes a folder of weights a model: configuration, tokenizer, and the like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# Of a model's folder everything is copied that is no weights and no description of another model.
_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe"})
_LEFT_OUT = frozenset(
    {
        "merge_report.json",
        "flexmerge.json",
        "flexmerge_analysis.json",
        "trainer_state.json",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "optimizer.json",
    }
)
_DTYPE_KEYS = ("dtype", "torch_dtype")


def copy_model_files(source: Path, target: Path, dtype: str | None) -> None:
    """Copy a model's files but its weights; with `dtype`, say so in the configuration."""
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and path.suffix in _SUFFIXES
            and path.name not in _LEFT_OUT
            and not path.name.endswith(".index.json")
        ):
            shutil.copyfile(path, target / path.name)
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
