"""Accuracy of a checkpoint on the four tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import ViTForImageClassification

from .data import Task


def load(folder: Path) -> ViTForImageClassification:
    """Load a checkpoint, and refuse one that does not fill the model exactly.

    ``from_pretrained`` only warns about tensors that it did not find and initialises them
    at random, which would make the table meaningless.
    """
    model, info = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    problems = {name: value for name, value in info.items() if value}
    if problems:
        raise RuntimeError(f"{folder} is not a complete checkpoint: {problems}")
    return model.eval()


@torch.no_grad()
def accuracy(model: ViTForImageClassification, task: Task, split: str) -> float:
    """The share of right answers among the classes of the task itself."""
    data = task.splits[split]
    logits = model(pixel_values=data.images).logits[:, task.classes]
    right = logits.argmax(dim=1) + task.offset == data.labels
    return float(right.float().mean())


def accuracies(
    model: ViTForImageClassification, tasks: Sequence[Task], split: str = "test"
) -> dict[str, float]:
    """Accuracy by the name of the task."""
    return {task.name: accuracy(model, task, split) for task in tasks}
