"""From similarities and a target size to the groups of tasks that share each block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.storage import GroupStorage, StoredGroup
from mergekit_ext.flexmerge.target import Size, Target
from mergekit_ext.kernels.channel import kmeans_groups
from mergekit_ext.kernels.grouping import MergeOrder, merge_order, partition


@dataclass(frozen=True)
class Plan:
    """The groups of every block at one size."""

    groups: tuple[tuple[StoredGroup, ...], ...]
    size: Size


class Planner(ABC):
    """Finds the plan for a target size."""

    def __init__(self, storage: GroupStorage):
        self.storage = storage

    @abstractmethod
    def plan(self, target: Target) -> Plan:
        """Return the largest plan that is not larger than `target`.

        Raises:
            ConfigError: the target cannot be reached.
        """

    @property
    @abstractmethod
    def sizes(self) -> list[float]:
        """Every size in models that can be had, from large to small."""

    def reaches(self, target: Target) -> bool:
        """Return whether `plan` would succeed."""
        try:
            self.plan(target)
        except ConfigError:
            return False
        return True


class Dendrograms(Planner):
    """Algorithm 1: the merges of all blocks in one order, stopped where the target is met.

    FlexMerge section 3.2: from all tasks apart, always the two most similar groups of any block.
    The order does not depend on the target size, and groups are compared by the cosines of the
    original task vectors.

    Args:
        storage: of the groups.
        similarities: for each block the (m, m) cosines of its task vectors.
        linkage: see `kernels.grouping.LINKAGES`.
        order: see `kernels.grouping.ORDERS`.
        seed: of a random order.

    Attributes:
        order: the merges.
        trajectory: the size before the first merge, and after each.
    """

    def __init__(
        self,
        storage: GroupStorage,
        similarities: Sequence[Tensor],
        linkage: str = "min",
        order: str = "greedy",
        seed: int = 0,
    ):
        super().__init__(storage)
        self.order: MergeOrder = merge_order(similarities, linkage, order, seed)
        self.trajectory = tuple(map(storage.size, self._bytes()))

    @property
    def sizes(self) -> list[float]:
        """See `Planner.sizes`."""
        return sorted({size.models for size in self.trajectory}, reverse=True)

    def _bytes(self) -> list[int]:
        now = [self.storage.bytes(i, self._stored(i, 0)) for i in range(self.storage.blocks)]
        done = [0] * len(now)
        totals = [sum(now)]
        for index in self.order.steps:
            done[index] += 1
            before = now[index]
            now[index] = self.storage.bytes(index, self._stored(index, done[index]))
            totals.append(totals[-1] + now[index] - before)
        return totals

    def _stored(self, block: int, merges: int) -> tuple[StoredGroup, ...]:
        sequence = self.order.sequences[block][:merges]
        similarity = {merge.union: merge.similarity for merge in sequence}
        groups = partition(sequence, self.storage.tasks)
        return self.storage.groups([(tasks, similarity.get(tasks)) for tasks in groups])

    def at(self, step: int) -> Plan:
        """Return the plan after so many merges."""
        done = [0] * self.storage.blocks
        for index in self.order.steps[:step]:
            done[index] += 1
        groups = tuple(self._stored(index, merges) for index, merges in enumerate(done))
        return Plan(groups, self.trajectory[step])

    def plan(self, target: Target) -> Plan:
        """See `Planner.plan`."""
        least = min(self.trajectory, key=lambda size: size.bytes)
        self.storage.require_reachable(target, least)
        return self.at(next(i for i, size in enumerate(self.trajectory) if target.holds(size)))


class Clusters(Planner):
    """Channel merging: in every block the same number of K-means clusters."""

    def __init__(self, storage: GroupStorage, grams: Sequence[Tensor], seed: int = 0):
        super().__init__(storage)
        self._grams, self._seed = tuple(grams), seed

    @property
    def sizes(self) -> list[float]:
        """See `Planner.sizes`."""
        return [float(k) for k in range(self.storage.tasks, 0, -1)]

    def plan(self, target: Target) -> Plan:
        """See `Planner.plan`; the target is the number of clusters."""
        clusters = whole_models(target, self.storage.tasks)
        groups = tuple(
            self.storage.groups(
                [(tasks, None) for tasks in kmeans_groups(gram, clusters, self._seed)]
            )
            for gram in self._grams
        )
        total = sum(self.storage.bytes(index, found) for index, found in enumerate(groups))
        return Plan(groups, self.storage.size(total))


def whole_models(target: Target, count: int) -> int:
    """Return the number of clusters that a target of `channel_merging` means.

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
