"""A user's evaluation as a callback, and as the function that `mergekit-ext sizes` calls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergekit_ext import flexmerge
from mergekit_ext.callbacks.trainer import is_main, unwrapped
from mergekit_ext.events import LOG_HOOKS, Callback, MergeEnd, require_hooks, takes
from mergekit_ext.io.class_model import class_of
from mergekit_ext.report.tables import checked_scores


class Evaluate(Callback):
    """Scores models with any function ``(model, task) -> {metric: value}``.

    An object of it is such a function too, which checks what the user's returns: give it to
    ``mergekit-ext sizes --evaluate MODULE:NAME`` or to `MergeCheckpoints`. As a callback it scores
    the output of each merge that is written to a folder, and models while and after they train.
    All scores are in `found`: one ``{"where", "task", "scores"}`` for each evaluation.

    Args:
        function: called without gradients, with the model in evaluation mode; of several processes
            in the main one only.
        tasks: the names that `function` is called with; a FlexMerge output has its own.
        every: while training, after each step that is a multiple of it; None for the end only.
        load: makes a model of a merge's folder; by default of the class in its ``config.json``.
        log: an object with a method ``log(values, step)`` for the scores of training.

    Raises:
        TypeError: `function` cannot be called, or `log` cannot log.
        ValueError: there are no tasks, or `every` is less than 1.
    """

    def __init__(
        self,
        function: Callable[[Any, str], Mapping[str, float] | float],
        *,
        tasks: Sequence[str] = ("model",),
        every: int | None = None,
        load: Callable[[Path], Any] | None = None,
        log: Any = None,
    ):
        if not takes(function, "model", "task"):
            raise TypeError(f"function: found {function!r}; expected a function (model, task).")
        if log is not None:
            require_hooks(log, LOG_HOOKS, "log")
        self._tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if not self._tasks:
            raise ValueError("tasks: found none; expected the name of one task at least.")
        if every is not None and every < 1:
            raise ValueError(f"every: found {every}; expected a number of steps, at least 1.")
        self._function, self._every, self._log, self._load = function, every, log, load or _load
        self._metrics: dict[str, set[str]] = {}
        self.found: list[dict[str, Any]] = []

    def __call__(self, model: Any, task: str) -> dict[str, float]:
        """Return the scores of one model; `EvaluationError` if they are no finite numbers."""
        with torch.no_grad(), evaluating(model):
            returned = self._function(model, task)
        return checked_scores(returned, task, f"task {task}", self._metrics)

    def on_merge_end(self, event: MergeEnd) -> None:
        if not event.output:  # a merge in memory
            return
        folder = Path(event.output)
        if (folder / "flexmerge.json").is_file():
            models: Mapping[str, Any] = flexmerge.load(folder)
        else:
            models = dict.fromkeys(self._tasks, self._load(folder))
        for task, model in models.items():
            self._keep(event.output, task, model)

    def on_step_end(self, step: int, model: Any) -> None:
        if self._every is not None and step % self._every == 0:
            self._train(step, model)

    def on_train_end(self, step: int, model: Any) -> None:
        if self._every is None or step % self._every:  # not done by `on_step_end`
            self._train(step, model)

    def state_dict(self) -> dict[str, Any]:
        return {"found": list(self.found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = list(state["found"])

    def _train(self, step: int, model: Any) -> None:
        if not is_main():
            return
        for task in self._tasks:
            found = self._keep(f"step {step}", task, unwrapped(model))
            if self._log is not None:
                self._log.log({f"{task}/{metric}": v for metric, v in found.items()}, step)

    def _keep(self, where: str, task: str, model: Any) -> dict[str, float]:
        found = self(model, task)
        self.found.append({"where": where, "task": task, "scores": found})
        return found


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch a model to evaluation mode for a while."""
    modules = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training


def _load(folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return (class_of(config) or transformers.AutoModel).from_pretrained(folder)
