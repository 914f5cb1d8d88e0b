"""Pre-training of one small ViT on all tasks, and fine-tuning of a copy of it for each task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from .data import IMAGE_SIZE, Split, Task

BATCH = 64


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; ``finetune_steps`` by the name of the task."""

    pretrain_steps: int
    finetune_steps: dict[str, int]
    pretrain_lr: float = 1e-3
    finetune_lr: float = 5e-4


FULL = Schedule(240, {"digit": 200, "rotation": 250, "scene": 100, "place": 250})
QUICK = Schedule(100, {"digit": 40, "rotation": 60, "scene": 40, "place": 160})


def new_model(tasks: Sequence[Task], seed: int, layers: int = 2) -> ViTForImageClassification:
    """A randomly initialised ViT with one classifier over the classes of all tasks."""
    names = [f"{task.name}:{label}" for task in tasks for label in task.class_names]
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    torch.manual_seed(seed)
    return ViTForImageClassification(config)


def pretrain(
    model: ViTForImageClassification, tasks: Sequence[Task], schedule: Schedule, seed: int
) -> None:
    """Train everything, the classifier included, on the small pre-training splits, in turn."""
    data = [(task.splits["pretrain"], task.classes) for task in tasks]
    parameters = list(model.parameters())
    fit(model, parameters, data, schedule.pretrain_steps, schedule.pretrain_lr, seed)


def finetune(
    start: ViTForImageClassification, task: Task, schedule: Schedule, seed: int
) -> ViTForImageClassification:
    """A copy of ``start`` trained on one task; the shared classifier stays frozen."""
    model = copy.deepcopy(start)
    parameters = list(model.vit.parameters())
    data = [(task.splits["train"], task.classes)]
    steps = schedule.finetune_steps[task.name]
    fit(model, parameters, data, steps, schedule.finetune_lr, seed)
    return model


def fit(
    model: ViTForImageClassification,
    parameters: list[torch.nn.Parameter],
    data: Sequence[tuple[Split, slice]],
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """AdamW with a one-cycle schedule; the loss looks at the classes of the batch's task only."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        split, classes = data[step % len(data)]
        rows = torch.randint(len(split), (BATCH,), generator=generator)
        logits = model(pixel_values=split.images[rows]).logits[:, classes]
        loss = F.cross_entropy(logits, split.labels[rows] - classes.start)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()
