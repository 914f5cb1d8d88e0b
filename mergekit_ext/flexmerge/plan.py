"""From similarities and a target size to the groups of tasks that share each block."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_ext.core.parameters import Parameter, choice
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.storage import GroupStorage, Size, Target
from mergekit_ext.flexmerge.stored import StoredGroup
from mergekit_ext.kernels import grouping

DEFAULT_ALGORITHM = "task_arithmetic"
TITLE, PAPER = "FlexMerge", "https://arxiv.org/abs/2505.23209"
USE = "Several tasks served in the space of any number of inputs between one and all."


def options(target: Any, blocks: Sequence[str], example: str) -> tuple[Parameter, ...]:
    """Return the parameters that FlexMerge has for models and for adapters.

    `target` is the type of `target_size`; of `blocks`, what a block can be, the default is first.
    """
    either = f"{example}, or a budget such as '12GB'"
    about = f"what everything may take: {either}"
    return (
        Parameter("target_size", target, description=about, remedy=f"Write {either}."),
        Parameter("algorithm", str, DEFAULT_ALGORITHM, "how the members of a group are merged"),
        Parameter("granularity", choice(*blocks), blocks[0], "what a block is"),
        Parameter("linkage", choice(*grouping.LINKAGES), "min", "similarity of two groups"),
        Parameter("order", choice(*grouping.ORDERS), "greedy", "which groups are merged first"),
    )


@dataclass(frozen=True)
class Plan:
    """The groups of every block at one size."""

    groups: tuple[tuple[StoredGroup, ...], ...]
    size: Size


class Planner(ABC):
    """Finds the plan for a target size; `storage` says what groups take."""

    storage: GroupStorage

    @abstractmethod
    def plan(self, target: Target) -> Plan:
        """Return the largest plan that `target` holds; raise `ConfigError` if there is none."""

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
    The order does not depend on the target size. `similarities` are for each block the (m, m)
    cosines of the original task vectors; `seed` is of a random order.
    """

    def __init__(
        self,
        storage: GroupStorage,
        similarities: Sequence[Tensor],
        linkage: str = "min",
        order: str = "greedy",
        seed: int = 0,
    ):
        self.storage = storage
        self.order = grouping.merge_order(similarities, linkage, order, seed)
        done = [0] * storage.blocks
        now = [storage.bytes(block, self._groups(block, 0)) for block in range(storage.blocks)]
        totals = [sum(now)]
        for block in self.order.steps:
            done[block] += 1
            before = now[block]
            now[block] = storage.bytes(block, self._groups(block, done[block]))
            totals.append(totals[-1] + now[block] - before)
        # The size before the first merge, and after each.
        self.trajectory = tuple(map(storage.size, totals))

    @property
    def sizes(self) -> list[float]:
        return sorted({size.models for size in self.trajectory}, reverse=True)

    def _groups(self, block: int, merges: int) -> tuple[StoredGroup, ...]:
        sequence = self.order.sequences[block][:merges]
        similarity = {merge.union: merge.similarity for merge in sequence}
        groups = grouping.partition(sequence, self.storage.tasks)
        return self.storage.groups([(tasks, similarity.get(tasks)) for tasks in groups])

    def at(self, step: int) -> Plan:
        """Return the plan after so many merges."""
        done = Counter(self.order.steps[:step])
        groups = (self._groups(block, done[block]) for block in range(self.storage.blocks))
        return Plan(tuple(groups), self.trajectory[step])

    def plan(self, target: Target) -> Plan:
        least = min(self.trajectory, key=lambda size: size.bytes)
        if problem := self.storage.problem(target, least):
            raise ConfigError([problem])
        return self.at(next(i for i, size in enumerate(self.trajectory) if target.holds(size)))


class Clusters(Planner):
    """Channel merging: in every block the same number of K-means clusters."""

    def __init__(self, storage: GroupStorage, grams: Sequence[Tensor], seed: int = 0):
        self.storage, self._grams, self._seed = storage, tuple(grams), seed

    @property
    def sizes(self) -> list[float]:
        return [float(k) for k in range(self.storage.tasks, 0, -1)]

    def plan(self, target: Target) -> Plan:
        """Take the target as the number of clusters."""
        storage = self.storage
        if problem := clusters_problem(target, storage.tasks):
            raise ConfigError([problem])
        clusters = int(target.models or 0)
        found = (grouping.kmeans_groups(gram, clusters, self._seed) for gram in self._grams)
        groups = tuple(storage.groups([(tasks, None) for tasks in each]) for each in found)
        return Plan(groups, storage.size(sum(map(storage.bytes, range(storage.blocks), groups))))


def clusters_problem(target: Target, count: int) -> Problem | None:
    """Return what is wrong with a target that is not a number of clusters of `count` tasks."""
    if target.models in range(1, count + 1):
        return None
    return Problem(
        "parameters.target_size",
        str(target),
        f"a whole number of models from 1 to {count} for `channel_merging`",
        "Write a whole number, or use `task_arithmetic` for sizes in between.",
    )
