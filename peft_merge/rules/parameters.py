"""Parameters that several rules have."""

from __future__ import annotations

from peft_merge.rules.base import Parameter

LAMBDA = Parameter("lambda", float, 1.0, help="factor of the merged change")


def normalize(default: bool) -> Parameter:
    """`normalize` with the default that a method has in mergekit."""
    return Parameter("normalize", bool, default, help="divide by the sum of the weights")
