"""The target size: a number of models, or a number of bytes."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ext import budget

# A budget that holds every merge, for those who want all sizes.
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
        models: in models of the shareable part, as `Size.models`.
        bytes: in bytes of everything stored, private tensors included.
    """

    models: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: object) -> Target:
        """Read 2.25, 12000000000 or "12GB" (powers of 1000; "GiB" for powers of 1024).

        Raises:
            ValueError: anything else; the message says what was expected.
        """
        expected = "a number of models such as 2.25, or a memory budget such as '12GB'"
        models, size = budget.parse(value, expected)
        return cls(models, size)

    @property
    def is_bytes(self) -> bool:
        """Whether it is a memory budget."""
        return self.bytes is not None

    def holds(self, size: Size) -> bool:
        """Whether a merge of that size is small enough."""
        if self.bytes is not None:
            return size.bytes <= self.bytes
        assert self.models is not None
        return size.models <= self.models * (1 + _ROUNDING)

    def exceeds(self, largest: Size) -> bool:
        """Whether it is above the size at which nothing is merged; a budget may be."""
        return self.models is not None and self.models > largest.models * (1 + _ROUNDING)

    @property
    def described(self) -> str:
        """With its unit, and the rule for numbers that have none."""
        rule = f"numbers below {budget.FIRST_BYTES} are models, others bytes"
        return f"{self} ({rule})" if self.is_bytes else f"{self} models ({rule})"

    def __str__(self) -> str:
        return f"{self.bytes} bytes" if self.is_bytes else f"{self.models:.15g}"
