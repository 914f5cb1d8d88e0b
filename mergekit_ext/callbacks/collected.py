"""What has been collected while training: the last snapshots, or a running mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_ext.callbacks.kinds import Kind, dtypes
from mergekit_ext.callbacks.settings import SUBJECT, Settings
from mergekit_ext.callbacks.state import Saved
from mergekit_ext.callbacks.store import (
    FolderStore,
    MemoryStore,
    SavedStore,
    Store,
    packed,
    unpacked,
)
from mergekit_ext.callbacks.weights import Weights, copied
from mergekit_ext.errors import ConfigError, Problem


class Snapshots:
    """The last `keep` snapshots, for a registered method."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._store = _store(settings)

    @property
    def steps(self) -> tuple[int, ...]:
        """Of what would be merged."""
        return self._store.steps

    def open(self) -> None:
        """See `Store.open`."""
        self._store.open()

    def clear(self) -> None:
        """Forget all snapshots."""
        self._store.clear()

    def add(self, step: int, weights: Weights, kind: Kind) -> None:
        """Keep a snapshot."""
        self._store.add(step, weights)

    def merge(
        self, kind: Kind, base: Weights | None, last: int | None
    ) -> tuple[tuple[int, ...], Weights, Mapping[str, Any]]:
        """Steps, merged weights and the report of the snapshots up to step `last`.

        Raises:
            ConfigError: there are none, or too few for the method.
        """
        found = self._store.snapshots(last)
        if not found:
            raise ConfigError([_nothing(last, self.steps)], SUBJECT)
        newest = list(found.values())[-1]
        problems = [*kind.problems(newest, len(found), base is not None)]
        if problems:
            raise ConfigError(problems, SUBJECT)
        weights, report = kind.merge(found, base)
        return tuple(found), weights, report

    def state(self) -> dict[str, Any]:
        """For `load`."""
        return self._store.state()

    def load(self, state: Saved) -> None:
        """Go on from `state`; see `Store.load`."""
        self._store.load(state)


class RunningMean:
    """A mean of all snapshots so far, without them."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._steps: list[int] = []
        self._mean: Weights | None = None
        self._dtypes: dict[str, str] = {}

    @property
    def steps(self) -> tuple[int, ...]:
        """Of all snapshots in the mean."""
        return tuple(self._steps)

    def open(self) -> None:
        """Nothing is written."""

    def clear(self) -> None:
        """Begin anew."""
        self._steps, self._mean = [], None

    def add(self, step: int, weights: Weights, kind: Kind) -> None:
        """Let a snapshot into the mean; once for each step."""
        if self._settings.running is None or (self._steps and step <= self._steps[-1]):
            return
        count = len(self._steps) + 1
        weight = self._settings.running.next_weight(count, self._settings.parameters)
        self._mean = kind.blend(self._mean, weights, weight)
        self._dtypes = dtypes(weights)
        self._steps.append(step)

    def merge(
        self, kind: Kind, base: Weights | None, last: int | None
    ) -> tuple[tuple[int, ...], Weights, Mapping[str, Any]]:
        """See `Snapshots.merge`; a mean cannot go back to an earlier step."""
        if self._mean is None:
            raise ConfigError([_nothing(last, self.steps)], SUBJECT)
        if last is not None and last < self.steps[-1]:
            expected = f"{self.steps[-1]} or later: `{self._settings.method}` keeps no snapshots"
            raise ConfigError([Problem("step", str(last), expected)], SUBJECT)
        return self.steps, kind.finished(self._mean, self._dtypes), {}

    def state(self) -> dict[str, Any]:
        """For `load`."""
        # A copy: the next snapshot is blended into the mean itself.
        mean = None if self._mean is None else packed(copied(self._mean))
        return {"steps": list(self._steps), "mean": mean, "dtypes": dict(self._dtypes)}

    def load(self, state: Saved) -> None:
        """Go on from `state`.

        Raises:
            ConfigError: it is no state of a mean; nothing was taken over.
        """
        steps, dtypes, mean = state["steps"].counts(), state["dtypes"].dtypes(), state["mean"]
        weights = None if mean.value is None else copied(unpacked(mean))
        if bool(steps) != (weights is not None):
            raise mean.refused("a mean if there are steps, and none if there are none")
        if weights is not None and weights.tensors.keys() != dtypes.keys():
            raise state["dtypes"].refused("one for each tensor of the mean")
        self._steps, self._dtypes, self._mean = steps, dtypes, weights


def collected(settings: Settings) -> Snapshots | RunningMean:
    """What suits the method."""
    return Snapshots(settings) if settings.running is None else RunningMean(settings)


def _store(settings: Settings) -> Store:
    if settings.on == "save":
        return SavedStore(settings.keep)
    if settings.folder is not None:
        return FolderStore(settings.keep, settings.folder)
    return MemoryStore(settings.keep)


def _nothing(last: int | None, steps: tuple[int, ...]) -> Problem:
    until = "" if last is None else f" up to step {last} (there are those of {list(steps)})"
    remedy = "Call on_step_end (or on_save) while training; look at `every` and `start`."
    return Problem("snapshots", f"none{until}", "one at least", remedy)
