"""The arguments of `MergeCheckpoints` and its saved state, checked as a whole."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import Problem, require
from mergekit_ext.events import LOG_HOOKS, MERGE_HOOKS, hook_problem, takes

INITIAL = "initial"
SUBJECT = "MergeCheckpoints"
AdapterOption = Annotated[str, Field(pattern="^(rank|patterns|space|modules_to_save|dtype)$")]
# Folders of snapshots are named with eight digits.
Step = Annotated[int, Field(ge=0, lt=10**8)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class Average(_Strict):
    """The uniform mean, in one pass: ``mean += weight(n) * (n-th - mean)``."""

    def weight(self, n: int) -> float:
        return 1 / n


class Ema(_Strict):
    """The exponential moving mean: of n snapshots the i-th has d^(n-i) (1-d) / (1-d^n), d `decay`.

    Without the correction the mean starts at the first snapshot, which keeps the weight d^(n-1).
    """

    decay: float = Field(0.999, ge=0, lt=1)
    bias_correction: bool = True

    def weight(self, n: int) -> float:
        if n == 1:
            return 1.0
        return (1 - self.decay) / (1 - self.decay**n if self.bias_correction else 1)


RUNNING: dict[str, type[Average] | type[Ema]] = {"average": Average, "ema": Ema}


class Settings(_Strict):
    method: str = "average"
    keep: int = Field(5, ge=1)
    every: int = Field(1, ge=1)
    start: int = Field(0, ge=0)
    on: Literal["step", "save"] = "step"
    where: str | Path | None = None
    base: str | Path | None = None
    parameters: dict[str, Any] = {}
    adapter: str | None = None
    adapter_options: dict[AdapterOption, Any] = {}
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "cpu"
    evaluate: Callable[..., Any] | None = None
    task: str = "model"
    metric: str | None = None
    greater_is_better: bool = True
    load: bool = False
    keep_better: bool = False
    callbacks: list[Any] | tuple[Any, ...] = ()
    log: Any = None

    def __init__(self, **given: Any):
        problems: list[Problem] = []
        try:
            super().__init__(**given)
        except ValidationError as error:
            problems = schema_problems(error, given)
        wrong = {problem.where for problem in problems}
        problems += [problem for problem in _together(given) if problem.where not in wrong]
        require(problems, SUBJECT)

    @property
    def running(self) -> Average | Ema | None:
        """The method, if it is a running mean, which keeps no snapshots."""
        return RUNNING[self.method](**self.parameters) if self.method in RUNNING else None


def _together(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what a type does not express: arguments that need others, objects that are called."""
    method, parameters = str(given.get("method", "average")), given.get("parameters", {})
    if running := RUNNING.get(method):
        try:
            running.model_validate(parameters)
        except ValidationError as error:
            yield from schema_problems(error, parameters, "parameters")
    evaluate, load, better = (given.get(name) for name in ("evaluate", "load", "keep_better"))
    processes = os.environ.get("WORLD_SIZE", "1")
    several_machines = os.environ.get("LOCAL_WORLD_SIZE", processes) != processes
    apart = load and given.get("where") is None and several_machines
    called = evaluate is None or takes(evaluate, "model", "task")
    for wrong, *problem in (
        (running and given.get("base") is not None, "base", "a base", f"none with `{method}`"),
        (running and given.get("on") == "save", "on", "'save'", f"'step' with `{method}`"),
        (better and evaluate is None, "keep_better", "no `evaluate`", "a function that scores"),
        (better and not load, "keep_better", "no `load`", "merged weights to load"),
        (apart, "where", "no folder, with `load` on several machines", "one that all of them see"),
        (not called, "evaluate", repr(evaluate), "a function (model, task)"),
    ):
        if wrong:
            yield Problem(*problem)
    callbacks = given.get("callbacks", ())
    for callback in callbacks if isinstance(callbacks, (list, tuple)) else ():
        if found := hook_problem(callback, MERGE_HOOKS, "callbacks"):
            yield found
    log = given.get("log")
    if log is not None and (found := hook_problem(log, LOG_HOOKS, "log")):
        yield found


class Mean(_Strict):
    """A running mean of tensors by name; with the configuration of the adapter if it is one."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    steps: list[Step] = []


class State(_Strict):
    """All that has been collected."""

    method: str
    saves: Annotated[int, Field(ge=0)]  # how many checkpoints have been saved
    folder: str  # of the run's own snapshots
    snapshots: dict[Step, str]  # the folder of each
    initial: bool  # whether `folder` holds the initial weights
    mean: Mean | None
