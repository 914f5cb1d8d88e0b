"""What a user's evaluation returns: one number, or numbers by metric."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_ext.errors import MergekitExtError

# The metric of a function that returns one number.
SCORE = "score"
_PACKAGE = Path(__file__).parents[1]
# What calls the user's function.
_OURS = {_PACKAGE / "callbacks", _PACKAGE / "host" / "flexmerge"}


class EvaluationError(MergekitExtError, ValueError):
    """What was to score a model did not return scores."""

    @classmethod
    def raised(cls, error: Exception, what: str) -> EvaluationError:
        """Return the error of an evaluation of `what` that raised: with its frames, not ours."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).parent not in _OURS]
        text = "".join([*traceback.format_list(own), *traceback.format_exception_only(error)])
        return cls(f"the evaluation of {what} raised an exception:\n{text.rstrip()}")


class CheckedScores:
    """Checks what a user's function returns for one model after the other."""

    def __init__(self) -> None:
        self._metrics: dict[str, set[str]] = {}

    def of(self, returned: Any, task: str, what: str) -> dict[str, float]:
        """Return the scores of one model by metric.

        Args:
            returned: by the user's function.
            task: the name of the model's task.
            what: was evaluated, as errors call it.

        Raises:
            EvaluationError: it is neither a finite number nor a mapping to finite numbers, or the
                metrics are not those of the first model of the task.
        """
        found = _numbers(returned)
        if found is None:
            text = repr(returned)
            raise EvaluationError(
                f"the evaluation of {what} returned "
                f"{text[:77] + '...' if len(text) > 80 else text}; expected a finite number, or a "
                "mapping from metrics to finite numbers such as {'accuracy': 0.9}."
            )
        metrics = self._metrics.setdefault(task, set(found))
        if metrics != set(found):
            raise EvaluationError(
                f"the evaluation of {what} returned {', '.join(sorted(found))}; expected "
                f"{', '.join(sorted(metrics))} as for the first model of this task."
            )
        return found


def _numbers(returned: Any) -> dict[str, float] | None:
    given = returned if isinstance(returned, Mapping) else {SCORE: returned}
    found = {}
    for metric, value in given.items():
        # Scalars of numpy and torch are numbers too; strings are not.
        if not isinstance(metric, str) or not hasattr(value, "__float__"):
            return None
        try:
            found[metric] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return None
    return found if found and all(map(math.isfinite, found.values())) else None
