"""The arguments of `MergeCheckpoints` and its saved state, checked as a whole.

Running means are kept without the snapshots, in one pass: ``mean += weight(n) * (n-th - mean)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.events import LOG_HOOKS, MERGE_HOOKS, hook_problem, takes

INITIAL = "initial"
SUBJECT = "MergeCheckpoints"
ADAPTER_OPTIONS = ("rank", "patterns", "space", "modules_to_save", "dtype")
_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
# Folders of snapshots are named with eight digits.
Step = Annotated[int, Field(ge=0, lt=10**8)]


class Average(BaseModel):
    """The uniform mean."""

    model_config = _STRICT

    def weight(self, n: int) -> float:
        """Return the weight of the n-th snapshot."""
        return 1 / n


class Ema(BaseModel):
    """The exponential moving mean: of n snapshots the i-th has d^(n-i) (1-d) / (1-d^n), d `decay`.

    So the mean starts at zero and is divided by the sum of its weights, as Adam does it. Without
    the correction it starts at the first snapshot, which keeps the weight d^(n-1): after n = 100
    snapshots and d = 0.999 that is 0.9 of the mean for a model that had hardly been trained.
    """

    model_config = _STRICT

    decay: float = Field(0.999, ge=0, lt=1)
    bias_correction: bool = True

    def weight(self, n: int) -> float:
        """Return the weight of the n-th snapshot."""
        if n == 1:
            return 1.0
        return (1 - self.decay) / (1 - self.decay**n if self.bias_correction else 1)


RUNNING: dict[str, type[Average] | type[Ema]] = {"average": Average, "ema": Ema}


class Settings(BaseModel):
    model_config = _STRICT

    method: str = "average"
    keep: int = Field(5, ge=1)
    every: int = Field(1, ge=1)
    start: int = Field(0, ge=0)
    on: Literal["step", "save"] = "step"
    where: str | Path | None = None
    base: str | Path | None = None
    parameters: dict[str, Any] = {}
    adapter: str | None = None
    adapter_options: dict[str, Any] = {}
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
        if problems:
            raise ConfigError(problems, SUBJECT)

    @property
    def running(self) -> Average | Ema | None:
        """The method, if it is a running mean, which keeps no snapshots."""
        return RUNNING[self.method](**self.parameters) if self.method in RUNNING else None


def _together(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what a type does not express: arguments that need others, objects that are called."""
    method, parameters = str(given.get("method", "average")), given.get("parameters", {})
    if method in RUNNING:
        try:
            RUNNING[method].model_validate(parameters)
        except ValidationError as error:
            yield from schema_problems(error, parameters, "parameters")
        if given.get("base") is not None:
            yield Problem("base", "a base", f"none: `{method}` has no base", "Leave it out.")
        if given.get("on") == "save":
            remedy = "Use `linear`, with `keep` for the number of checkpoints."
            yield Problem("on", "'save'", f"'step': `{method}` sees the live model", remedy)
    for name in given.get("adapter_options") or {}:
        if name not in ADAPTER_OPTIONS:
            expected = f"one of {', '.join(ADAPTER_OPTIONS)}"
            yield Problem(f"adapter_options.{name}", "an unknown option", expected)
    if given.get("keep_better") and given.get("evaluate") is None:
        remedy = "Give `evaluate=`, a function (model, task) -> {metric: value}."
        yield Problem("keep_better", "no evaluation", "a measure of what is better", remedy)
    if given.get("keep_better") and not given.get("load"):
        remedy = "Add `load=True`."
        yield Problem("keep_better", "it without `load`", "merged weights to load", remedy)
    everywhere = os.environ.get("WORLD_SIZE", "1")
    together = os.environ.get("LOCAL_WORLD_SIZE", everywhere) == everywhere
    if given.get("load") and given.get("where") is None and not together:
        found = "a temporary folder of one of several machines, with `load=True`"
        remedy = "Give `where=`: every process loads the merged weights from there."
        yield Problem("where", found, "a folder that all machines see", remedy)
    evaluate, log = given.get("evaluate"), given.get("log")
    if evaluate is not None and not takes(evaluate, "model", "task"):
        yield Problem("evaluate", repr(evaluate), "a function (model, task)")
    if log is not None and (problem := hook_problem(log, LOG_HOOKS, "log")):
        yield problem
    callbacks = given.get("callbacks", ())
    for callback in callbacks if isinstance(callbacks, (list, tuple)) else ():
        if problem := hook_problem(callback, MERGE_HOOKS, "callbacks"):
            yield problem


class Mean(BaseModel):
    """A running mean of tensors by name; with the configuration of the adapter if it is one."""

    model_config = _STRICT

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None


class State(BaseModel):
    """All that has been collected.

    Attributes:
        method: of the run.
        saves: how many checkpoints have been saved.
        folder: of the run's own snapshots.
        snapshots: the folder of each, by step.
        initial: whether `folder` holds the initial weights.
        steps: of the snapshots in the mean.
        mean: of a method that keeps no snapshots.
    """

    model_config = _STRICT

    method: str
    saves: Annotated[int, Field(ge=0)]
    folder: str
    snapshots: dict[Step, str]
    initial: bool
    steps: list[Step]
    mean: Mean | None

    @model_validator(mode="after")
    def _complete(self) -> State:
        if bool(self.steps) != (self.mean is not None):
            raise ValueError("a mean if there are steps in it, and none if there are none")
        return self

    @classmethod
    def of(cls, state: Any) -> State:
        """Return a state that was saved.

        Raises:
            ConfigError: it is none.
        """
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            raise ConfigError(schema_problems(error, state, "state"), SUBJECT) from None
