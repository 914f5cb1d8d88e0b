"""Train one small ViT on a little of everything, and a copy of it for each of eight tasks.

python -m examples.flexmerge.train --out out/flexmerge

Writes OUT/models/base, OUT/models/<task>, and OUT/merge.yml, which names them.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import ViTForImageClassification

from examples.quickstart import train as quickstart
from examples.quickstart.data import Task
from examples.quickstart.evaluate import load

from .config import write_config
from .data import TASKS, load_tasks

LAYERS = 3
BATCH = 48  # of the task's images, and again of the images that the start was trained on


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; ``memory``: weight of the loss on ``old`` images a task."""

    pretrain_steps: int
    finetune_steps: int
    pretrain_lr: float = 1e-3
    finetune_lr: float = 0.03
    memory: float = 0.3
    old: int = 200


FULL = Schedule(pretrain_steps=640, finetune_steps=300)
QUICK = Schedule(pretrain_steps=8, finetune_steps=2, old=20)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    _be_modest()
    began = time.perf_counter()
    models = options.out / "models"
    shutil.rmtree(models, ignore_errors=True)
    schedule = QUICK if options.quick else FULL
    tasks = tuple(load_tasks().values())
    base = quickstart.new_model(tasks, options.seed, LAYERS)
    pretrain = quickstart.Schedule(schedule.pretrain_steps, {}, schedule.pretrain_lr)
    quickstart.pretrain(base, tasks, pretrain, options.seed)
    base.save_pretrained(models / "base")
    print(f"pre-trained ({time.perf_counter() - began:.1f} s)", flush=True)
    jobs = [(models, name, schedule, options.seed + i) for i, name in enumerate(TASKS, start=1)]
    for name, seconds in _run(jobs, 1 if options.quick else options.processes):
        print(f"fine-tuned for {name} ({seconds:.1f} s)", flush=True)
    write_config(options.out)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s in all. Written: {models}, {options.out / 'merge.yml'}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.flexmerge.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/flexmerge"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few training steps: a smoke test")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(os.cpu_count() or 1, len(TASKS)),
        help="tasks that are trained at the same time; the result does not depend on it",
    )
    return parser.parse_args(arguments)


def finetune(
    base: ViTForImageClassification,
    task: Task,
    tasks: Sequence[Task],
    schedule: Schedule,
    seed: int,
) -> ViTForImageClassification:
    """A copy of ``base`` with a head for ``task`` alone, trained on the task.

    loss = CE(task's images) + memory · mean (z − z_base)² over old images,

    with z the logits that the base's own classifier gives: learning without forgetting (Li and
    Hoiem, ECCV 2016), on images that the base was trained on. Without it, networks as small as
    these forget so much that their task vectors disturb each other far more than those of the
    large models that people merge.
    """
    generator = torch.Generator().manual_seed(seed)
    old = _old_images(tasks, schedule.old, generator)
    with torch.no_grad():
        remembered = base(pixel_values=old).logits
    model = _with_own_head(base, task)
    images = task.splits["train"].images
    labels = task.splits["train"].labels - task.offset
    # Not AdamW: its task vectors gain less at the fraction of their length that a merge leaves.
    optimizer = torch.optim.SGD(model.parameters(), schedule.finetune_lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        schedule.finetune_lr,
        total_steps=schedule.finetune_steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    model.train()
    for _ in range(schedule.finetune_steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        old_rows = torch.randint(len(old), (BATCH,), generator=generator)
        batch = torch.cat([images[rows], old[old_rows]])
        features = model.vit(pixel_values=batch).last_hidden_state[:, 0]
        loss = F.cross_entropy(model.classifier(features[:BATCH]), labels[rows])
        logits = F.linear(
            features[BATCH:], base.classifier.weight.detach(), base.classifier.bias.detach()
        )
        loss = loss + schedule.memory * F.mse_loss(logits, remembered[old_rows])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


def _old_images(tasks: Sequence[Task], count: int, generator: torch.Generator) -> Tensor:
    """Equally many pre-training images of every task."""
    chosen = []
    for task in tasks:
        images = task.splits["pretrain"].images
        chosen.append(images[torch.randperm(len(images), generator=generator)[:count]])
    return torch.cat(chosen)


def _with_own_head(base: ViTForImageClassification, task: Task) -> ViTForImageClassification:
    """A copy of ``base`` that keeps only the task's rows of the classifier."""
    config = copy.deepcopy(base.config)
    config.id2label = dict(enumerate(task.class_names))
    config.label2id = {name: number for number, name in enumerate(task.class_names)}
    model = ViTForImageClassification(config)
    model.vit.load_state_dict(base.vit.state_dict())
    with torch.no_grad():
        model.classifier.weight.copy_(base.classifier.weight[task.classes])
        model.classifier.bias.copy_(base.classifier.bias[task.classes])
    return model


def _run(
    jobs: Sequence[tuple[Path, str, Schedule, int]], processes: int
) -> Iterator[tuple[str, float]]:
    """Fine-tune for every job, several at a time, and yield names and times in order."""
    if processes == 1:
        yield from map(_finetune_one, jobs)
        return
    # Processes, not threads: tensors as small as these gain nothing from a second thread.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_finetune_one, jobs)


def _finetune_one(job: tuple[Path, str, Schedule, int]) -> tuple[str, float]:
    models, name, schedule, seed = job
    _be_modest()
    tasks = load_tasks()
    began = time.perf_counter()
    base = load(models / "base")
    model = finetune(base, tasks[name], tuple(tasks.values()), schedule, seed)
    model.save_pretrained(models / name)
    return name, time.perf_counter() - began


def _be_modest() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
