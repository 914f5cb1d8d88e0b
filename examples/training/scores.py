"""The scores of merged weights, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.functional import cross_entropy

from mergekit_ext.callbacks import MergeCheckpoints

from .digits import LORE, Digits, Run


def scorer(data: Digits) -> Callable[[Any, str], dict[str, float]]:
    """A function (model, task) -> {metric: value}, as every evaluation of the project is."""

    def score(model: Any, task: str) -> dict[str, float]:
        logits = model(pixel_values=data.test_images).logits
        right = logits.argmax(dim=1) == data.test_labels
        loss = cross_entropy(logits, data.test_labels)
        return {"accuracy": float(right.float().mean()), "loss": float(loss)}

    return score


def merges(run: Run, data: Digits) -> dict[str, MergeCheckpoints]:
    """The callbacks that are compared: all merge the same snapshots."""
    score = scorer(data)
    return {
        "mean": MergeCheckpoints("linear", keep=run.keep, every=run.every, evaluate=score),
        "lore": MergeCheckpoints(
            "lore", keep=run.keep, every=run.every, evaluate=score, parameters=LORE
        ),
    }


def table(callbacks: dict[str, MergeCheckpoints]) -> str:
    """Markdown: the scores of the last weights, and of each merge."""
    results = {name: callback.result for name, callback in callbacks.items()}
    rows: dict[str, Any] = {}
    for name, result in results.items():
        if result is not None:
            rows.setdefault("last checkpoint", result.before)
            rows[f"{name} of the last {len(result.steps)}"] = result.scores
    lines = ["| weights | accuracy | loss |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {scores['accuracy']:.4f} | {scores['loss']:.4f} |"
        for name, scores in rows.items()
    ]
    return "\n".join(lines)
