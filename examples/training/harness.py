"""Scores from EleutherAI's lm-evaluation-harness as an evaluation of this project.

    from examples.training.harness import lm_eval_function
    from mergekit_ext.callbacks import Evaluate

    evaluate = Evaluate(lm_eval_function("some/tokenizer", limit=100), tasks=["arc_easy"])
    mergekit_ext.merge("merge.yml", "out", callbacks=[evaluate])
    print(evaluate.found)

A FlexMerge has tasks of its own: `tasks` says what lm-eval calls the one of each. What lm-eval does
not know itself lies as YAML in the folder `include_path`:

    tasks = {"maths": "gsm8k", "law": "my_law"}
    evaluate = Evaluate(lm_eval_function("some/tokenizer", tasks=tasks, include_path="evals"))

It needs ``pip install 'mergekit-ext[eval]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def lm_eval_function(
    tokenizer: Any,
    *,
    tasks: Mapping[str, str] | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    limit: float | None = None,
) -> Callable[[Any, str], dict[str, float]]:
    """A function (model, task) -> {metric: value} for causal language models.

    Args:
        tokenizer: of the models: the object, or its name or folder.
        tasks: the task, group or tag of lm-eval for the names of a FlexMerge's tasks; other names
            are lm-eval's own.
        include_path: a folder with the YAML of more tasks.
        batch_size: of the evaluation.
        limit: how many examples of the task, or below 1 which part of them; None for all.

    Raises:
        ImportError: lm-eval is not installed; says how to install it.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "lm-eval is not installed; run: pip install 'mergekit-ext[eval]'"
        ) from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))

    def evaluate(model: Any, task: str) -> dict[str, float]:
        name = (tasks or {}).get(task, task)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=[name], limit=limit, task_manager=manager
        )["results"]
        # A tag has no scores of its own, but those of its tasks.
        chosen = {name: found[name]} if name in found else found
        return {
            # Metrics are called `acc,none`: what follows the comma is the filter of answers.
            ("" if name in found else f"{part}/") + metric.removesuffix(",none"): float(value)
            for part, metrics in chosen.items()
            for metric, value in metrics.items()
            if "," in metric and isinstance(value, (int, float)) and "_stderr" not in metric
        }

    return evaluate
