"""The sizes of what groups of tasks store, and which of them a target allows."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from mergekit_ext.core.memory import FIRST_BYTES, count_or_bytes, in_models
from mergekit_ext.errors import Problem
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.stored import StoredGroup, stored_of

EXPECTED = "a number of models such as 2.25, or a memory budget such as '12GB'"
# A budget that holds every merge, where all sizes are wanted.
ANY_SIZE = "1000000TB"
# Sizes are ratios of byte counts: 2.25 must hold a merge of exactly 2.25 models.
_ROUNDING = 1e-9
# From here on masks and one vector are smaller than the members themselves.
_MASKED_FROM = 3
# Partitions of the tasks, with the similarity that each group was merged at.
Partition: TypeAlias = Sequence[tuple[tuple[int, ...], float | None]]


@dataclass(frozen=True)
class Size:
    """The bytes of all tensors that are stored, of private ones among them, and of a unit.

    `unit_bytes`: of the shareable tensors of one model, on average over the inputs.
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
    """What a merge may occupy: so many `models` (or adapters), as `Size.models`; or `bytes`."""

    models: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, value: object, expected: str = EXPECTED) -> "Target":
        """Read a size as `count_or_bytes` does; raise `ValueError` with `expected`."""
        return cls(*count_or_bytes(value, expected))

    def holds(self, size: Size) -> bool:
        """Return whether a merge of that size is small enough."""
        if self.bytes is not None:
            return size.bytes <= self.bytes
        return size.models <= (self.models or 0) * (1 + _ROUNDING)

    def exceeds(self, largest: Size) -> bool:
        """Return whether it is above the size at which nothing is merged; a budget may be."""
        return self.models is not None and self.models > in_models(largest.models)

    def __str__(self) -> str:
        return f"{self.models:.15g}" if self.bytes is None else f"{self.bytes} bytes"


class GroupStorage(ABC):
    """How the groups of a family of models are stored: so many blocks of so many tasks.

    `private_bytes` are those of what is never shared.
    """

    what = "models"  # or adapters, of which sizes are numbers

    def __init__(self, blocks: int, tasks: int, private_bytes: int):
        self.blocks, self.tasks, self.private_bytes = blocks, tasks, private_bytes

    @abstractmethod
    def bytes(self, block: int, groups: Sequence[StoredGroup]) -> int:
        """Return the bytes of all tensors that are stored of a block."""

    @property
    @abstractmethod
    def least(self) -> Size:
        """A size below which no partition leads, whatever the similarities."""

    @abstractmethod
    def advice(self, target: Target) -> str:
        """Return what makes smaller sizes possible."""

    def groups(self, found: Partition) -> tuple[StoredGroup, ...]:
        """Return the groups that are stored of a partition."""
        return tuple(StoredGroup(tasks, "dense", similarity) for tasks, similarity in found)

    @cached_property
    def apart(self) -> tuple[StoredGroup, ...]:
        """Every task by itself."""
        return tuple(StoredGroup((task,)) for task in range(self.tasks))

    @cached_property
    def whole(self) -> int:
        """Bytes of all shareable tensors of all tasks, kept apart."""
        return sum(self.bytes(block, self.apart) for block in range(self.blocks))

    @property
    def most(self) -> Size:
        """The largest size."""
        return self.size(self.whole)

    def size(self, shareable: int) -> Size:
        """Return the size of a merge that stores so many bytes of blocks."""
        return Size(shareable + self.private_bytes, self.whole / self.tasks, self.private_bytes)

    def problem(self, target: Target, least: Size | None = None) -> Problem | None:
        """Return what is wrong with a target that is not between `least` and `most`."""
        least, most = least or self.least, self.most
        if target.holds(least) and not target.exceeds(most):
            return None
        above = in_models(least.models, 4)
        low, high = f"{min(above, most.models):.10g}", f"{most.models:.10g}"
        if target.exceeds(most):
            remedy = f"Write {high}, the largest size, or less."
        else:
            smallest = low if target.bytes is None else f"'{least.bytes}B'"
            remedy = f"Write {smallest} for the smallest. {self.advice(target)}".strip()
        unit = "" if target.models is None else f" {self.what}"
        return Problem(
            "parameters.target_size",
            f"{target}{unit} (numbers below {FIRST_BYTES} are {self.what}, others bytes)",
            f"what can be reached: {low} to {high} {self.what}, or {least.bytes} bytes and more",
            remedy,
        )


class Storage(GroupStorage):
    """How groups of models are stored, in the dtype `forced` if one is asked for.

    With `masks` groups from three on become a unified vector and masks; smaller ones are kept as
    they are.
    """

    def __init__(self, layout: Layout, masks: bool = False, forced: torch.dtype | None = None):
        super().__init__(len(layout.blocks), len(layout.tasks), layout.private_bytes)
        self.layout, self.masks, self.forced = layout, masks, forced

    def groups(self, found: Partition) -> tuple[StoredGroup, ...]:
        groups: list[StoredGroup] = []
        for tasks, similarity in found:
            if len(tasks) == 1 or (self.masks and len(tasks) < _MASKED_FROM):
                groups.extend(StoredGroup((task,)) for task in tasks)
            else:
                groups.append(StoredGroup(tasks, "masked" if self.masks else "dense", similarity))
        return tuple(sorted(groups, key=lambda group: group.tasks[0]))

    def bytes(self, block: int, groups: Sequence[StoredGroup]) -> int:
        entries = stored_of(self.layout.blocks[block], groups, self.forced)
        return sum(math.prod(shape) * dtype.itemsize for _, _, shape, dtype in entries)

    @cached_property
    def least(self) -> Size:
        """Every block merged, or kept apart where that is smaller."""
        # Masks over a base of a wider dtype may take more than they save.
        merged = self.groups([(tuple(range(self.tasks)), None)])
        blocks = range(self.blocks)
        return self.size(sum(min(self.bytes(b, merged), self.bytes(b, self.apart)) for b in blocks))

    def advice(self, target: Target) -> str:
        parts = [part for block in self.layout.blocks for part in block.parts]
        mixed = any(len(set(part.dtypes)) > 1 for part in parts)
        if self.masks or self.forced is not None or not mixed:
            return ""
        return (
            "The models' dtypes differ, and what is shared takes the widest: with `dtype:` all are "
            "stored in one, and size 1 can be reached."
        )
