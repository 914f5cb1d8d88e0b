"""Train four small ViTs, merge them with ``mergekit-yaml``, and compare the results.

python -m examples.quickstart --out out/quickstart
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers

from . import evaluate, merging, report, train
from .data import Task, load_tasks


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # For tensors as small as these more threads gain nothing, and cost much on a busy machine.
    torch.set_num_threads(1)
    start_time = time.perf_counter()
    tasks = load_tasks(options.seed)
    models = options.out / "models"
    for old in (models, options.out / "merged"):
        shutil.rmtree(old, ignore_errors=True)
    train_all(tasks, models, train.QUICK if options.quick else train.FULL, options.seed)
    train_seconds = time.perf_counter() - start_time
    rows = score_inputs(tasks, models)
    individual = rows[-1].accuracy
    for method in options.methods:
        began = time.perf_counter()
        scores = evaluate.accuracies(evaluate.load(merging.merge(method, options.out)), tasks)
        rows.append(report.make_row(method, "merged", scores, individual))
        say(f"merged with {method}", began)
    names = [task.name for task in tasks]
    total = time.perf_counter() - start_time
    details = {
        "seed": options.seed,
        "quick": options.quick,
        "methods": options.methods,
        "tasks": {task.name: {k: len(v) for k, v in task.splits.items()} for task in tasks},
        "seconds": {"training": round(train_seconds, 1), "total": round(total, 1)},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    report.write_json(options.out / "results.json", rows, details)
    report.write_plot(options.out / "results.png", rows, names)
    print(f"\nTest accuracy:\n\n{report.table(rows, names)}\n")
    print(f"{total:.0f} s in all. Written: {options.out / 'results.json'}, results.png")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="output folder")
    known = merging.available_methods()
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a few training steps: a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def train_all(tasks: tuple[Task, ...], folder: Path, schedule: train.Schedule, seed: int) -> None:
    """Write the pre-trained start and one fine-tuned checkpoint per task into ``folder``."""
    began = time.perf_counter()
    model = train.new_model(tasks, seed)
    train.pretrain(model, tasks, schedule, seed)
    model.save_pretrained(folder / "pretrained")
    say("pre-trained", began)
    for number, task in enumerate(tasks, start=1):
        began = time.perf_counter()
        tuned = train.finetune(model, task, schedule, seed + number)
        tuned.save_pretrained(folder / task.name)
        say(f"fine-tuned for {task.name}", began)


def score_inputs(tasks: tuple[Task, ...], models: Path) -> list[report.Row]:
    """Rows of the start, of each fine-tuned model, and of the four taken together."""
    start = evaluate.accuracies(evaluate.load(models / "pretrained"), tasks)
    tuned = {t.name: evaluate.accuracies(evaluate.load(models / t.name), tasks) for t in tasks}
    own = {name: scores[name] for name, scores in tuned.items()}
    return [
        report.make_row("pre-trained start", "start", start, own),
        *(report.make_row(f"{k} model", "finetuned", v, own) for k, v in tuned.items()),
        report.make_row(report.INDIVIDUAL, "individual", own, own),
    ]


def say(what: str, began: float) -> None:
    print(f"{what} ({time.perf_counter() - began:.1f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
