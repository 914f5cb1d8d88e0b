"""Parameters that several rules have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft_merge.rules.base import Parameter

LAMBDA = Parameter("lambda", float, 1.0, help="factor of the merged change")

# What is left of 0.1 + 0.2 - 0.3 in floats is none.
_CANCELLED = 1e-12


def cancelling(weights: Sequence[float]) -> bool:
    """Whether weights sum to 0 but for rounding, so that nothing can be divided by their sum."""
    return abs(math.fsum(weights)) <= _CANCELLED * math.fsum(map(abs, weights))


def normalize(default: bool) -> Parameter:
    """`normalize` with the default that a method has in mergekit."""
    return Parameter("normalize", bool, default, help="divide by the sum of the weights")
