"""Scores of merged weights beside those of the model's own, and which are to be kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from mergekit_ext.callbacks.evaluate import Evaluate
from mergekit_ext.callbacks.kinds import Kind
from mergekit_ext.callbacks.merged import Merged
from mergekit_ext.callbacks.processes import unwrapped
from mergekit_ext.callbacks.settings import SUBJECT, Settings
from mergekit_ext.errors import ConfigError, Problem


class Comparison:
    """Evaluates as the arguments of `MergeCheckpoints` say."""

    def __init__(self, settings: Settings):
        self._settings = settings
        given = settings.evaluate
        self._evaluate = given if given is None or isinstance(given, Evaluate) else Evaluate(given)

    def scored(self, merged: Merged, model: Any, kind: Kind, step: int) -> Merged:
        """With the scores of both, logged under `step`; as it was without a function."""
        if self._evaluate is None:
            return merged
        inner, task, metric = unwrapped(model), self._settings.task, self._settings.metric
        before = self._evaluate(inner, task)
        if metric is not None and metric not in before:
            expected = f"one of {', '.join(before)}, which `evaluate` returns"
            raise ConfigError([Problem("metric", repr(metric), expected)], SUBJECT)
        with kind.applied(model, merged.weights):
            scores = self._evaluate(inner, task)
        if self._settings.log is not None:
            values = {f"merged/{name}": value for name, value in scores.items()}
            self._settings.log.log(values | {f"last/{k}": v for k, v in before.items()}, step)
        return dataclasses.replace(merged, scores=scores, before=before)

    def wanted(self, merged: Merged) -> bool:
        """Whether the merged weights are to be loaded."""
        if not self._settings.load or not self._settings.keep_better:
            return self._settings.load
        if merged.scores is None or merged.before is None:
            return False
        metric = self._settings.metric or next(iter(merged.scores))
        gain = merged.scores[metric] - merged.before[metric]
        return gain > 0 if self._settings.greater_is_better else gain < 0
