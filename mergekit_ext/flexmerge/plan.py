"""From similarities and a target size to who shares which block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.manifest import DENSE, MASKED
from mergekit_ext.flexmerge.target import Size, Target
from mergekit_ext.kernels.channel import kmeans_groups
from mergekit_ext.kernels.grouping import MergeOrder, merge_order, partition

# From here on masks and one vector are smaller than the members themselves.
_MASKED_FROM = 3


@dataclass(frozen=True)
class StoredGroup:
    """Tasks that share what is stored of a block."""

    tasks: tuple[int, ...]
    kind: str = DENSE
    similarity: float | None = None


@dataclass(frozen=True)
class Storage:
    """How groups are stored.

    Attributes:
        layout: the blocks.
        masks: whether groups from three on become a unified vector and masks; smaller ones are
            then kept as they are.
        forced: the dtype of everything shareable, if it is not that of the inputs.
    """

    layout: Layout
    masks: bool = False
    forced: torch.dtype | None = None

    def groups(self, found: Sequence[tuple[tuple[int, ...], float | None]]) -> list[StoredGroup]:
        """What is stored of a partition."""
        stored: list[StoredGroup] = []
        for tasks, similarity in found:
            if len(tasks) == 1 or (self.masks and len(tasks) < _MASKED_FROM):
                stored.extend(StoredGroup((task,)) for task in tasks)
            else:
                stored.append(StoredGroup(tasks, MASKED if self.masks else DENSE, similarity))
        return sorted(stored, key=lambda group: group.tasks[0])

    def bytes(self, block: BlockLayout, groups: Sequence[StoredGroup]) -> int:
        """Bytes of the tensors stored for a block."""
        total = sum(block.bytes(group.tasks, self.forced) for group in groups)
        masked = [group for group in groups if group.kind == MASKED]
        if masked:
            total += block.base_bytes
            total += sum(len(group.tasks) for group in masked) * -(-block.size // 8)
        return total

    @cached_property
    def whole(self) -> int:
        """Bytes of all shareable tensors of all models, kept apart."""
        tasks = range(len(self.layout.tasks))
        return sum(
            block.bytes((task,), self.forced) for block in self.layout.blocks for task in tasks
        )

    @cached_property
    def least(self) -> Size:
        """The smallest size there is: every block merged, or kept apart where that is smaller.

        Masks over a base of a wider dtype may take more than they save.
        """
        tasks = tuple(range(len(self.layout.tasks)))
        merged = self.groups([(tasks, None)])
        apart = [StoredGroup((task,)) for task in tasks]
        return self.size(
            sum(min(self.bytes(b, merged), self.bytes(b, apart)) for b in self.layout.blocks)
        )

    def size(self, shareable: int) -> Size:
        """The size of a merge that stores so many bytes of blocks."""
        private = self.layout.private_bytes
        return Size(shareable + private, self.whole / len(self.layout.tasks), private)

    def require_reachable(self, target: Target, least: Size) -> None:
        """Raise `ConfigError` unless `target` lies between `least` and everything kept apart."""
        most = self.size(self.whole)
        if target.holds(least) and not target.exceeds(most):
            return
        expected = (
            f"{least.bytes} bytes or more"
            if target.is_bytes
            else f"{_up(least.models):.10g} to {most.models:.10g}"
        )
        low = f"'{least.bytes}B'" if target.is_bytes else f"{_up(least.models):.10g}"
        remedy = f"Write {low} for the smallest."
        if target.exceeds(most):
            remedy = f"Write {most.models:.10g}, at which nothing is merged, or less."
        elif dtypes := self._widening:
            expected += f" (dtypes differ, {dtypes}, and what is shared takes the widest)"
            remedy += " With `dtype:` all are stored in one dtype, and size 1 can be reached."
        problem = Problem(
            "parameters.target_size",
            target.described,
            f"what these models and this algorithm can reach: {expected}",
            remedy,
        )
        raise ConfigError([problem])

    @property
    def _widening(self) -> str:
        """The dtypes of tensors that take more room merged than some model gives them."""
        if self.masks or self.forced is not None:
            return ""
        parts = [part for block in self.layout.blocks for part in block.parts]
        mixed = {dtype for part in parts if len(set(part.dtypes)) > 1 for dtype in part.dtypes}
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in mixed))


@dataclass(frozen=True)
class Plan:
    """Who shares what at one size: for each block its groups."""

    groups: tuple[tuple[StoredGroup, ...], ...]
    size: Size


class Planner(ABC):
    """Finds the plan for a target size."""

    def __init__(self, storage: Storage):
        self.storage = storage

    @abstractmethod
    def plan(self, target: Target) -> Plan:
        """The largest plan that is not larger than `target`.

        Raises:
            ConfigError: the target cannot be reached.
        """

    @property
    @abstractmethod
    def sizes(self) -> list[float]:
        """Every size in models that can be had, from large to small."""

    def reaches(self, target: Target) -> bool:
        """Whether `plan` would succeed."""
        try:
            self.plan(target)
        except ConfigError:
            return False
        return True


class Dendrograms(Planner):
    """Algorithm 1: the merges of all blocks in one order, stopped where the target is met.

    Attributes:
        order: the merges.
        trajectory: the size before the first merge, and after each.
    """

    def __init__(
        self,
        storage: Storage,
        similarities: Sequence[Tensor],
        linkage: str = "min",
        order: str = "greedy",
        seed: int = 0,
    ):
        super().__init__(storage)
        self.order: MergeOrder = merge_order(similarities, linkage, order, seed)
        self.trajectory = tuple(map(storage.size, self._trajectory()))

    @property
    def sizes(self) -> list[float]:
        """See `Planner.sizes`."""
        return sorted({size.models for size in self.trajectory}, reverse=True)

    def _trajectory(self) -> list[int]:
        blocks = self.storage.layout.blocks
        now = [self.storage.bytes(block, self._stored(i, 0)) for i, block in enumerate(blocks)]
        done = [0] * len(blocks)
        sizes, total = [sum(now)], sum(now)
        for index in self.order.steps:
            done[index] += 1
            after = self.storage.bytes(blocks[index], self._stored(index, done[index]))
            total += after - now[index]
            now[index] = after
            sizes.append(total)
        return sizes

    def _stored(self, block: int, merges: int) -> list[StoredGroup]:
        sequence = self.order.sequences[block][:merges]
        similarity = {merge.union: merge.similarity for merge in sequence}
        groups = partition(sequence, len(self.storage.layout.tasks))
        return self.storage.groups([(tasks, similarity.get(tasks)) for tasks in groups])

    def at(self, step: int) -> Plan:
        """The plan after so many merges."""
        done = [0] * len(self.storage.layout.blocks)
        for index in self.order.steps[:step]:
            done[index] += 1
        groups = tuple(tuple(self._stored(i, merges)) for i, merges in enumerate(done))
        return Plan(groups, self.trajectory[step])

    def plan(self, target: Target) -> Plan:
        """See `Planner.plan`."""
        least = min(self.trajectory, key=lambda size: size.bytes)
        self.storage.require_reachable(target, least)
        fitting = (step for step, size in enumerate(self.trajectory) if target.holds(size))
        return self.at(next(fitting))


class Clusters(Planner):
    """Channel merging: in every block the same number of K-means clusters."""

    def __init__(self, storage: Storage, grams: Sequence[Tensor], seed: int = 0):
        super().__init__(storage)
        self._grams, self._seed = tuple(grams), seed

    @property
    def sizes(self) -> list[float]:
        """See `Planner.sizes`."""
        return [float(k) for k in range(len(self.storage.layout.tasks), 0, -1)]

    def plan(self, target: Target) -> Plan:
        """See `Planner.plan`; the target is the number of clusters."""
        clusters = whole_models(target, len(self.storage.layout.tasks))
        groups, total = [], 0
        for block, gram in zip(self.storage.layout.blocks, self._grams, strict=True):
            found = kmeans_groups(gram, clusters, self._seed)
            stored = tuple(self.storage.groups([(tasks, None) for tasks in found]))
            groups.append(stored)
            total += self.storage.bytes(block, stored)
        return Plan(tuple(groups), self.storage.size(total))


def whole_models(target: Target, count: int) -> int:
    """The number of clusters that a target of `channel_merging` means.

    Raises:
        ConfigError: it is not a whole number from 1 to `count`.
    """
    clusters = target.models
    if clusters is None or clusters != int(clusters) or not 1 <= clusters <= count:
        problem = Problem(
            "parameters.target_size",
            str(target),
            f"a whole number of models from 1 to {count} for `channel_merging`",
            "Write a whole number, or use `task_arithmetic` for sizes in between.",
        )
        raise ConfigError([problem])
    return int(clusters)


def _up(value: float) -> float:
    """A short number that is not below `value`."""
    return math.ceil(value * 1e4 - 1e-6) / 1e4
