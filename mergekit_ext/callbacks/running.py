"""Averages that are kept while training, without the snapshots: uniform and exponential."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ext.errors import Problem


@dataclass(frozen=True)
class Running:
    """A weighted mean in one pass: ``mean += weight(n) * (n-th snapshot - mean)``, n from 1.

    Attributes:
        parameters: their names and defaults.
        check: yields what is wrong with the parameters, defaults filled in.
        weight: of the n-th snapshot, between 0 and 1; 1 for the first.
    """

    parameters: Mapping[str, Any]
    check: Callable[[Mapping[str, Any]], Iterable[Problem]]
    weight: Callable[[int, Mapping[str, Any]], float]

    def problems(self, name: str, given: Mapping[str, Any]) -> Iterable[Problem]:
        """Yield what is wrong with the parameters that a user gives."""
        for key in given.keys() - self.parameters.keys():
            found = f"a parameter that `{name}` does not have"
            expected = f"one of {', '.join(self.parameters)}" if self.parameters else "none at all"
            yield Problem(f"parameters.{key}", found, expected, "Take it out.")
        yield from self.check({**self.parameters, **given})

    def next_weight(self, n: int, given: Mapping[str, Any]) -> float:
        """Return the weight of the n-th snapshot."""
        return self.weight(n, {**self.parameters, **given})


def _decays(parameters: Mapping[str, Any]) -> Iterable[Problem]:
    decay, correction = parameters["decay"], parameters["bias_correction"]
    if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
        yield Problem("parameters.decay", repr(decay), "a number from 0 to less than 1")
    if not isinstance(correction, bool):
        yield Problem("parameters.bias_correction", repr(correction), "true or false")


def _ema(n: int, parameters: Mapping[str, Any]) -> float:
    """With d the decay, the i-th of n snapshots has the weight d^(n-i) (1-d) / (1-d^n).

    So the mean starts at zero and is divided by the sum of its weights, as Adam does it. Without
    the correction it starts at the first snapshot, which keeps the weight d^(n-1): after n = 100
    snapshots and d = 0.999 that is 0.9 of the mean for a model that had hardly been trained.
    """
    decay = float(parameters["decay"])
    if n == 1:
        return 1.0
    if not parameters["bias_correction"]:
        return 1 - decay
    return (1 - decay) / (1 - decay**n)


RUNNING: dict[str, Running] = {
    "average": Running({}, lambda _: (), lambda n, _: 1 / n),
    "ema": Running({"decay": 0.999, "bias_correction": True}, _decays, _ema),
}
