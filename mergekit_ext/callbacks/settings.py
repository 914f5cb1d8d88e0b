"""The arguments of `MergeCheckpoints`, checked as a whole before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_ext.callbacks.running import RUNNING, Running
from mergekit_ext.errors import ConfigError, Problem

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
    adapter_options: Mapping[str, Any]
    seed: int
    device: Any
    metric: str | None
    greater_is_better: bool
    load: bool
    keep_better: bool
    evaluated: bool
    callbacks: tuple[object, ...] = field(default=())

    def __post_init__(self) -> None:
        if problems := [*self._problems()]:
            raise ConfigError(problems, SUBJECT)

    @property
    def running(self) -> Running | None:
        """The method, if it keeps no snapshots."""
        return RUNNING.get(self.method)

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
        if self.on not in MOMENTS:
            yield Problem("on", repr(self.on), " or ".join(map(repr, MOMENTS)))
        if not isinstance(self.where, (str, os.PathLike)):
            yield Problem("where", repr(self.where), "'memory', or a folder")
        elif self.on == "save" and self.where != MEMORY:
            remedy = "Leave `where` out: saved checkpoints are merged from where they are."
            yield Problem("where", repr(self.where), "nothing beside on='save'", remedy)
        if not isinstance(self.parameters, Mapping):
            yield Problem("parameters", repr(self.parameters), "a mapping from names to values")
        elif self.running is not None:
            yield from self.running.problems(self.method, self.parameters)
        if self.running is None:
            yield from _name_problems(self.method)
        elif self.base is not None:
            expected = f"nothing: `{self.method}` has no base"
            yield Problem("base", "a base", expected, "Leave it out.")
        if self.keep_better and not self.evaluated:
            remedy = "Give `evaluate=`, a function (model, task) -> {metric: value}."
            yield Problem("keep_better", "no evaluation", "something that tells better", remedy)
        if self.keep_better and not self.load:
            remedy = "Add `load=True`."
            yield Problem("keep_better", "it without `load`", "merged weights to load", remedy)


def _name_problems(method: Any) -> Iterable[Problem]:
    from peft_merge.config.wording import did_you_mean
    from peft_merge.rules.base import rules

    # Rules make one adapter; the other methods of `peft_merge` make several.
    names = {*RUNNING, *rules()}
    if method in names:
        return
    from mergekit_ext.host.state_dicts import known_methods  # takes seconds

    names |= set(known_methods())
    if method not in names:
        expected = "a registered merge method that makes one model, or `average` or `ema`"
        yield Problem("method", repr(method), expected, did_you_mean(str(method), sorted(names)))
