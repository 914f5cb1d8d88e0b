"""The YAML file that merges the eight models."""

from __future__ import annotations

from pathlib import Path

import yaml

from .data import TASKS


def write_config(
    folder: Path, target_size: float = 2.0, algorithm: str = "task_arithmetic"
) -> Path:
    """Write ``folder``/merge.yml for ``folder``/models; the paths in it are absolute.

    Absolute, because ``--evaluate examples.flexmerge.evaluate:evaluate`` is found from the root of
    the repository, and the models should be found from there as well.
    """
    models = folder.resolve() / "models"
    document = {
        "merge_method": "flexmerge",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / task), "parameters": {"task": task}} for task in TASKS],
        "parameters": {"target_size": target_size, "algorithm": algorithm},
    }
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path
