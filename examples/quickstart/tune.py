"""A search over ``search.yml`` on validation images; the test images are not looked at.

python -m examples.quickstart.tune --models out/quickstart
"""

from __future__ import annotations

import argparse
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

import mergekit_ext

from .data import Task, load_tasks
from .evaluate import accuracy


@cache
def tasks(seed: int = 0) -> dict[str, Task]:
    return {task.name: task for task in load_tasks(seed)}


def evaluate(model: Any, task: str) -> float:
    return accuracy(model, tasks()[task], "validation")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.tune")
    parser.add_argument("--models", type=Path, default=Path("out/quickstart"), metavar="OUT")
    parser.add_argument("--trials", type=int, default=30)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = Path(__file__).with_name("search.yml").resolve()
    os.chdir(options.models)  # the configuration names ./models/<task>
    found = mergekit_ext.tune(config, "tuned", evaluate, MergeOptions(), trials=options.trials)
    print(f"{found.score:.4f} on validation images: {options.models / 'tuned' / 'best.yml'}")


if __name__ == "__main__":
    main()
