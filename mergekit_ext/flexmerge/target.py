"""Sizes and target sizes: a number of models (or adapters), or a number of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergekit_ext.core.memory import FIRST_BYTES, count_or_bytes
from mergekit_ext.errors import Problem

EXPECTED = "a number of models such as 2.25, or a memory budget such as '12GB'"
# A budget that holds every merge, where all sizes are wanted.
ANY_SIZE = "1000000TB"
# Sizes are ratios of byte counts: 2.25 must hold a merge of exactly 2.25 models.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Size:
    """What is stored.

    Attributes:
        bytes: of all tensors, each once.
        unit_bytes: of the shareable tensors of one model, on average over the inputs.
        private_bytes: of tensors that are never shared; in `bytes`.
    """

    bytes: int
    unit_bytes: float
    private_bytes: int

    @property
    def models(self) -> float:
        """``(bytes - private_bytes) / unit_bytes``: m when nothing is shared."""
        return (self.bytes - self.private_bytes) / self.unit_bytes


@dataclass(frozen=True)
class Target:
    """What a merge may occupy. Exactly one of `models` and `bytes` is given.

    Attributes:
        models: in models (or adapters) of the shareable part, as `Size.models`.
        bytes: in bytes of everything stored, private tensors included.
    """

    models: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: object, expected: str = EXPECTED) -> Target:
        """Read 2.25, 12000000000 or "12GB" (powers of 1000; "GiB" for powers of 1024).

        Raises:
            ValueError: anything else; the message is `expected`.
        """
        return cls(*count_or_bytes(value, expected))

    def holds(self, size: Size) -> bool:
        """Return whether a merge of that size is small enough."""
        if self.bytes is not None:
            return size.bytes <= self.bytes
        assert self.models is not None
        return size.models <= self.models * (1 + _ROUNDING)

    def exceeds(self, largest: Size) -> bool:
        """Return whether it is above the size at which nothing is merged; a budget may be."""
        return self.models is not None and self.models > largest.models * (1 + _ROUNDING)

    def __str__(self) -> str:
        return f"{self.models:.15g}" if self.bytes is None else f"{self.bytes} bytes"


def out_of_reach(
    target: Target, least: Size, most: Size, what: str, note: str = "", remedy: str = ""
) -> Problem | None:
    """Return the problem of a target that is not between two sizes; None if it is.

    Args:
        target: what is asked for.
        least: the smallest size.
        most: the size at which nothing is merged.
        what: models or adapters.
        note: what else there is to know of the range.
        remedy: what makes smaller sizes possible.
    """
    if target.holds(least) and not target.exceeds(most):
        return None
    low, high = f"{math.ceil(least.models * 1e4 - 1e-6) / 1e4:.10g}", f"{most.models:.10g}"
    rule = f"numbers below {FIRST_BYTES} are {what}, others bytes"
    found = f"{target} ({rule})" if target.models is None else f"{target} {what} ({rule})"
    smallest = low if target.bytes is None else f"'{least.bytes}B'"
    advice = f"Write {smallest} for the smallest. {remedy}".strip()
    if target.exceeds(most):
        note, advice = "", f"Write {high}, at which nothing is merged, or less."
    expected = f"{low} to {high} {what}, or {least.bytes} bytes and more{note}"
    return Problem("parameters.target_size", found, f"what can be reached: {expected}", advice)
