"""The arguments of `MergeCheckpoints`, checked as a whole before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ext.callbacks.running import RUNNING, Running
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.events import Dispatcher
from mergekit_ext.hooks import takes

MEMORY, INITIAL = "memory", "initial"
MOMENTS = ("step", "save")
SUBJECT = "MergeCheckpoints"


@dataclass(frozen=True)
class Settings:
    """See `MergeCheckpoints`."""

    method: str
    keep: int
    every: int
    start: int
    on: str
    where: Any
    base: Any
    parameters: Any
    adapter: str | None
    adapter_options: Any
    seed: int
    device: Any
    evaluate: Any
    task: str
    metric: str | None
    greater_is_better: bool
    load: bool
    keep_better: bool
    callbacks: Any
    log: Any

    def __post_init__(self) -> None:
        if problems := [*self._problems()]:
            raise ConfigError(problems, SUBJECT)

    @property
    def running(self) -> Running | None:
        """The method, if it keeps no snapshots."""
        return RUNNING.get(self.method) if isinstance(self.method, str) else None

    @property
    def folder(self) -> Path | None:
        """Where snapshots are written; None for memory."""
        return None if self.where == MEMORY else Path(self.where)

    def wants(self, step: int) -> bool:
        """Whether a snapshot is due at a step."""
        return step >= self.start and step % self.every == 0

    def _problems(self) -> Iterable[Problem]:
        for name, least in (("keep", 1), ("every", 1), ("start", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                yield Problem(name, repr(value), f"a whole number, at least {least}")
        for name in ("greater_is_better", "load", "keep_better"):
            if not isinstance(getattr(self, name), bool):
                yield Problem(name, repr(getattr(self, name)), "True or False")
        for name in ("task", "metric", "adapter"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "task"):
                yield Problem(name, repr(value), "a name")
        yield from _place_problems(self.seed, self.device)
        yield from self._called()
        if self.on not in MOMENTS:
            yield Problem("on", repr(self.on), " or ".join(map(repr, MOMENTS)))
        if not isinstance(self.where, (str, os.PathLike)):
            yield Problem("where", repr(self.where), "'memory', or a folder")
        elif self.on == "save" and self.where != MEMORY:
            remedy = "Leave `where` out: saved checkpoints are merged from where they are."
            yield Problem("where", repr(self.where), "nothing beside on='save'", remedy)
        if not isinstance(self.adapter_options, Mapping):
            yield Problem("adapter_options", repr(self.adapter_options), "names and values")
        if not isinstance(self.parameters, Mapping):
            yield Problem("parameters", repr(self.parameters), "a mapping from names to values")
        elif self.running is not None:
            yield from self.running.problems(self.method, self.parameters)
        if self.running is None:
            yield from _name_problems(self.method)
        elif self.base is not None:
            expected = f"nothing: `{self.method}` has no base"
            yield Problem("base", "a base", expected, "Leave it out.")
        if self.keep_better and self.evaluate is None:
            remedy = "Give `evaluate=`, a function (model, task) -> {metric: value}."
            yield Problem("keep_better", "no evaluation", "something that tells better", remedy)
        if self.keep_better and not self.load:
            remedy = "Add `load=True`."
            yield Problem("keep_better", "it without `load`", "merged weights to load", remedy)

    def _called(self) -> Iterable[Problem]:
        """What is wrong with functions and objects that are called when training ends."""
        if self.evaluate is not None and not takes(self.evaluate, "model", "task"):
            yield Problem("evaluate", repr(self.evaluate), "a function (model, task)")
        if self.log is not None and not takes(getattr(self.log, "log", None), "values", "step"):
            expected = "an object with log(values, step), such as an Accelerator or a tracker"
            yield Problem("log", repr(self.log), expected)
        if not isinstance(self.callbacks, tuple):
            yield Problem("callbacks", repr(self.callbacks), "a list of them")
            return
        try:
            Dispatcher(self.callbacks)
        except TypeError as error:
            text = str(error).removeprefix("callbacks: found ").removesuffix(".")
            found, _, expected = text.partition("; expected ")
            yield Problem("callbacks", found, expected)


def _place_problems(seed: Any, device: Any) -> Iterable[Problem]:
    from peft_merge.config.options import device_of, seed_problem

    found = (seed_problem(seed), device_of(device))
    yield from (problem for problem in found if isinstance(problem, Problem))


def _name_problems(method: Any) -> Iterable[Problem]:
    from mergekit_ext.core.wording import did_you_mean
    from peft_merge.methods import rules

    # Rules make one adapter; the other methods of `peft_merge` make several.
    names = {*RUNNING, *rules()}
    if isinstance(method, str) and method in names:
        return
    from mergekit_ext.host.state_dicts import known_methods  # takes seconds

    names |= set(known_methods())
    if not isinstance(method, str) or method not in names:
        expected = "a registered merge method that makes one model, or `average` or `ema`"
        yield Problem("method", repr(method), expected, did_you_mean(str(method), sorted(names)))
