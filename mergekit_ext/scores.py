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
_HERE = Path(__file__).parent
# What calls the user's function.
_OURS = {_HERE / "callbacks", _HERE / "host" / "flexmerge"}


class EvaluationError(MergekitExtError, ValueError):
    """What was to score a model did not return scores."""

    @classmethod
    def raised(cls, error: Exception, what: str) -> EvaluationError:
        """Return the error of an evaluation of `what` that raised: with its frames, not ours."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).parent not in _OURS]
        text = "".join([*traceback.format_list(own), *traceback.format_exception_only(error)])
        return cls(f"the evaluation of {what} raised an exception:\n{text.rstrip()}")


def numbers(returned: Any) -> dict[str, float] | None:
    """Finite scores by metric; None if it is something else."""
    given = returned if isinstance(returned, Mapping) else {SCORE: returned}
    found = {}
    for metric, value in given.items():
        # Scalars of numpy and torch are numbers too; strings are not.
        if not isinstance(metric, str) or not hasattr(value, "__float__"):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return None
        if not math.isfinite(number):
            return None
        found[metric] = number
    return found or None


def require(returned: Any, what: str) -> dict[str, float]:
    """Scores by metric.

    Args:
        returned: by the user's function.
        what: was evaluated, as the error calls it.

    Raises:
        EvaluationError: it is neither a finite number nor a mapping to finite numbers.
    """
    found = numbers(returned)
    if found is None:
        text = repr(returned)
        raise EvaluationError(
            f"the evaluation of {what} returned {text[:77] + '...' if len(text) > 80 else text}; "
            "expected a finite number, or a mapping from metrics to finite numbers such as "
            "{'accuracy': 0.9}."
        )
    return found
