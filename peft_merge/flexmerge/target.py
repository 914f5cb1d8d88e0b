"""What a merge may occupy: a number of adapters, or a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_ext import budget
from mergekit_ext.errors import Problem

# Sizes are ratios of byte counts: 2.25 must hold a merge of exactly 2.25 adapters.
_ROUNDING = 1e-9

EXPECTED = "a number of adapters such as 2.5, or a memory budget such as '40MB'"


@dataclass(frozen=True)
class Size:
    """What is stored.

    Attributes:
        bytes: of all tensors that differ between tasks or are shared, each once.
        unit_bytes: of the factors (or vectors) of one adapter, on average over the inputs.
        private_bytes: of whole tensors (`modules_to_save`), which are never shared; in `bytes`.
    """

    bytes: int
    unit_bytes: float
    private_bytes: int

    @property
    def adapters(self) -> float:
        """``(bytes - private_bytes) / unit_bytes``: m when nothing is shared."""
        return (self.bytes - self.private_bytes) / self.unit_bytes


@dataclass(frozen=True)
class Target:
    """Exactly one of the two is given.

    Attributes:
        adapters: see `Size.adapters`.
        bytes: see `Size.bytes`.
    """

    adapters: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: object) -> Target:
        """Read 2.5, 40000000 or "40MB" (powers of 1000; "MiB" for powers of 1024).

        Raises:
            ValueError: anything else.
        """
        adapters, size = budget.parse(value, EXPECTED)
        return cls(adapters, size)

    def holds(self, size: Size) -> bool:
        """Whether a merge of that size is small enough."""
        if self.adapters is not None:
            return size.adapters <= self.adapters * (1 + _ROUNDING)
        assert self.bytes is not None
        return size.bytes <= self.bytes

    def exceeds(self, largest: Size) -> bool:
        """Whether it is above the size at which nothing is shared; a budget may be."""
        return self.adapters is not None and self.adapters > largest.adapters * (1 + _ROUNDING)

    def within(self, sizes: Sequence[Size]) -> bool:
        """Whether it can be met, given what can be had; the first is the size without sharing."""
        return not self.exceeds(sizes[0]) and any(map(self.holds, sizes))

    def __str__(self) -> str:
        return f"{self.bytes} bytes" if self.adapters is None else f"{self.adapters:.15g} adapters"


def out_of_reach(target: Target, sizes: Sequence[Size]) -> Problem:
    """What is said of a target that is not within `sizes`."""
    least = min(sizes, key=lambda size: size.bytes)
    high = sizes[0].adapters
    if target.exceeds(sizes[0]):
        remedy = f"Write {high:.10g}, at which nothing is shared, or less."
    elif target.adapters is not None and target.adapters < 1:
        remedy = (
            "No size below 1 can ever be reached, unless what LoRAs share has a smaller `rank` "
            "than they have (with `patterns: true`)."
        )
    else:
        remedy = (
            "A smaller `rank` for what LoRAs share (with `patterns: true`) makes less possible."
        )
    return Problem(
        "parameters.target_size",
        str(target),
        f"what these adapters can reach: {_up(least.adapters):.10g} to {high:.10g} adapters, or "
        f"{least.bytes} bytes and more",
        remedy,
    )


def _up(value: float) -> float:
    """A short number that is not below `value`."""
    return math.ceil(value * 1e4 - 1e-6) / 1e4
