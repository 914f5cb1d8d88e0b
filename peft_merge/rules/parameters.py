"""Parameters that several rules have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ext.errors import MergeError
from peft_merge.rules.base import Parameter, cancelling

LAMBDA = Parameter("lambda", float, 1.0, help="factor of the merged change")


def divided_by(weights: Sequence[float], instead: str) -> float:
    """The sum of the weights, by which a sum is divided.

    Checks refuse weights that sum to 0 before work. Those of some adapters only, as of a group
    of FlexMerge's, or with NAN's coefficients come here.

    Args:
        instead: the option that leaves the sum undivided, for the message.

    Raises:
        MergeError: it is 0.
    """
    if cancelling(weights):
        raise MergeError(
            f"weights that sum to 0, which have no mean. Use `{instead}`, or change `weight`."
        )
    return math.fsum(weights)


def normalize(default: bool) -> Parameter:
    """`normalize` with the default that a method has in mergekit."""
    return Parameter("normalize", bool, default, help="divide by the sum of the weights")


def normalized(options: Mapping[str, Any]) -> bool:
    """The value of `normalize`."""
    return bool(options["normalize"])
