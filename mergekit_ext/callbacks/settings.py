"""The arguments of `MergeCheckpoints`, checked as a whole before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_ext.callbacks.averages import RUNNING, Average, Ema
from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.events import Dispatcher, takes

INITIAL = "initial"
SUBJECT = "MergeCheckpoints"
ADAPTER_OPTIONS = ("rank", "patterns", "space", "modules_to_save", "dtype")


class Settings(BaseModel):
    """See `MergeCheckpoints`."""

    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)

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
    evaluate, log = given.get("evaluate"), given.get("log")
    if evaluate is not None and not takes(evaluate, "model", "task"):
        yield Problem("evaluate", repr(evaluate), "a function (model, task)")
    if log is not None and not takes(getattr(log, "log", None), "values", "step"):
        expected = "an object with log(values, step), such as an Accelerator or a tracker"
        yield Problem("log", repr(log), expected)
    callbacks = given.get("callbacks", ())
    if isinstance(callbacks, (list, tuple)):
        try:
            Dispatcher(callbacks)
        except TypeError as error:
            found, _, expected = str(error).removeprefix("callbacks: found ").partition("; ")
            yield Problem("callbacks", found, expected.removeprefix("expected ").rstrip("."))
