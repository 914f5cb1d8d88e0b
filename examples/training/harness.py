"""Scores from EleutherAI's lm-evaluation-harness as an evaluation of this project.

    from examples.training.harness import lm_eval_function
    from mergekit_ext.callbacks import Evaluate

    evaluate = Evaluate(lm_eval_function("some/tokenizer", limit=100), tasks=["arc_easy"])
    mergekit_ext.merge("merge.yml", "out", callbacks=[evaluate])
    print(evaluate.found)

It needs ``pip install 'mergekit-ext[eval]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def lm_eval_function(
    tokenizer: Any, *, batch_size: int = 8, limit: float | None = None
) -> Callable[[Any, str], dict[str, float]]:
    """A function (model, task) -> {metric: value} for causal language models.

    Args:
        tokenizer: of the models: the object, or its name or folder.
        batch_size: of the evaluation.
        limit: how many examples of the task, or below 1 which part of them; None for all.

    Raises:
        ImportError: lm-eval is not installed; says how to install it.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            "lm-eval is not installed; run: pip install 'mergekit-ext[eval]'"
        ) from error

    def evaluate(model: Any, task: str) -> dict[str, float]:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=wrapped, tasks=[task], limit=limit)
        return {
            # Metrics are called `acc,none`: what follows the comma is the filter of answers.
            metric.removesuffix(",none"): float(value)
            for metric, value in found["results"][task].items()
            if isinstance(value, (int, float)) and "_stderr" not in metric
        }

    return evaluate
