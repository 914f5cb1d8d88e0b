"""How the parameters in ``configs/`` were chosen: a small grid for each method, on validation data.

python -m examples.quickstart.tune --models out/quickstart

Every method gets a grid of 12 to 18 points (``linear`` has nothing to choose); the mean accuracy on
the validation split decides, and the test split is not looked at. The configs are not rewritten:
the program prints what is best.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from . import evaluate, merging
from .data import Task, load_tasks

GRIDS: dict[str, dict[str, list[Any]]] = {
    "task_arithmetic": {
        "weight": [0.15, 0.2, 0.225, 0.25, 0.275, 0.3, 0.325, 0.35, 0.375, 0.4, 0.45, 0.5]
    },
    "ties": {"density": [0.2, 0.5, 0.8], "lambda": [0.3, 0.45, 0.6, 0.8, 1.0, 1.2]},
    "nan": {
        "granularity": ["tensor", "block", "model"],
        "scale": [0.8, 1.0, 1.2, 1.4, 1.6, 2.0],
    },
    "nan_ties": {"density": [0.2, 0.5, 0.8], "scale": [0.3, 0.45, 0.6, 0.8, 1.0, 1.2]},
    "lore": {"mu_relative": [0.05, 0.1, 0.2], "lambda": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.tune")
    parser.add_argument("--models", type=Path, default=Path("out/quickstart"), metavar="OUT")
    parser.add_argument("--methods", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--seed", type=int, default=0, help="the seed that trained the models")
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tasks = load_tasks(options.seed)
    os.chdir(options.models)  # the configs name ./models/<task>
    for method in options.methods:
        results = []
        for parameters in combinations(GRIDS[method]):
            score = validation_accuracy(method, parameters, tasks)
            results.append((score, parameters))
            print(f"{method:16} {score:.4f}  {parameters}", flush=True)
        score, parameters = max(results, key=lambda result: result[0])
        print(f"best: {method} {score:.4f} with {parameters}\n", flush=True)


def combinations(grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each parameter."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def validation_accuracy(method: str, parameters: dict[str, Any], tasks: Sequence[Task]) -> float:
    """Mean accuracy of the merge of ``configs/<method>.yml`` with some parameters replaced."""
    text = (merging.CONFIGS / f"{method}.yml").read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    document["parameters"].update(parameters)
    config = MergeConfiguration.model_validate(document)
    merge_options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, merge_options)
        scores = evaluate.accuracies(evaluate.load(Path(folder)), tasks, "validation")
    return sum(scores.values()) / len(scores)


if __name__ == "__main__":
    main()
