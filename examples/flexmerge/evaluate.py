"""Accuracy of one task's model: ``--evaluate examples.flexmerge.evaluate:evaluate``."""

from __future__ import annotations

import torch
from transformers import ViTForImageClassification

from .data import load_tasks

BATCH = 512


def evaluate(model: ViTForImageClassification, task: str) -> dict[str, float]:
    """The share of right answers on the test images of ``task``.

    ``model`` is in evaluation mode and answers with the classes of the task; the images are made
    in the first call, and kept. Raises ``KeyError`` for an unknown task, and ``ValueError`` for a
    model with another number of classes.
    """
    tasks = load_tasks()
    if task not in tasks:
        raise KeyError(f"task {task!r} is not one of {', '.join(tasks)}")
    data, classes = tasks[task].splits["test"], len(tasks[task].class_names)
    right = 0
    for images, labels in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
        with torch.no_grad():
            logits = model(pixel_values=images.to(model.device, model.dtype)).logits
        if logits.shape[1] != classes:
            raise ValueError(f"{task} has {classes} classes; the model has {logits.shape[1]}")
        right += int((logits.argmax(dim=1).cpu() + tasks[task].offset == labels).sum())
    return {"accuracy": right / len(data)}
