"""``python -m examples.architectures KIND``: two fine-tunes of a base, merged with `nan`.

Everything is made on the spot, and scored after reloading with the class's own library.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.options import MergeOptions

import mergekit_ext

KINDS = ("speech", "vision_language", "embedding")


def train(kind: Any, model: Any, tasks: list[str], how: tuple[int, float], seed: int) -> Any:
    """Train on batches of the tasks in turn, so many steps at a rate, and return the model."""
    steps, rate = how
    torch.manual_seed(seed)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        kind.loss(model, tasks[step % len(tasks)]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, merge, print the table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the models are kept")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    kind: Any = importlib.import_module(f"examples.architectures.{given.kind}")
    first, second = ((2, 1e-3), (2, 1e-3)) if given.quick else (kind.BASE, kind.TUNING)
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        tasks = list(kind.TASKS)
        train(kind, kind.base(), tasks, first, seed=0).save_pretrained(out / "base")
        for seed, task in enumerate(tasks, 1):
            tuned = train(kind, kind.load(out / "base"), [task], second, seed)
            tuned.save_pretrained(out / task)
        document = {
            "merge_method": "nan",
            "base_model": str(out / "base"),
            "models": [{"model": str(out / task)} for task in tasks],
            **kind.SETTINGS,
        }
        options = MergeOptions(quiet=True)
        mergekit_ext.merge(yaml.safe_dump(document), out / "merged", options)
        scores = {}
        for name in ("base", *tasks, "merged"):
            model = kind.load(out / name).eval()
            with torch.no_grad():
                scores[name] = {task: kind.accuracy(model, task) for task in tasks}
    print("| model | " + " | ".join(tasks) + " |\n|" + " --- |" * (len(tasks) + 1))
    for name, found in scores.items():
        print(f"| {name} | " + " | ".join(f"{found[task]:.3f}" for task in tasks) + " |")
    print(f"\n{time.perf_counter() - started:.0f} s")
    return scores


if __name__ == "__main__":
    main()
