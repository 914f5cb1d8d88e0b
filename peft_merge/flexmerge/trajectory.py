"""FlexMerge's Algorithm 1 on adapters: which tasks share which block at each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_ext.errors import ConfigError
from mergekit_ext.kernels.grouping import MergeOrder, merge_order, partition
from peft_merge.flexmerge.blocks import Block
from peft_merge.flexmerge.family import Family, Group
from peft_merge.flexmerge.target import Size, Target, out_of_reach


@dataclass(frozen=True)
class Shared:
    """Tasks that share a block; `similarity` is that of their last merge, None for one task."""

    tasks: Group
    similarity: float | None = None


class Trajectory:
    """The merges of all blocks in one order, and the size before the first and after each.

    FlexMerge section 3.2: from all tasks apart, always the two most similar groups of any block.
    The order does not depend on the target size, and groups are compared by the cosines of the
    original changes.

    Attributes:
        order: the merges.
        sizes: of every step.
    """

    def __init__(
        self,
        family: Family,
        blocks: Sequence[Block],
        cosines: Sequence[Tensor],
        private_bytes: int,
        *,
        linkage: str = "min",
        order: str = "greedy",
        seed: int = 0,
    ):
        self._family, self._blocks, self._count = family, tuple(blocks), len(cosines[0])
        self.order: MergeOrder = merge_order(cosines, linkage, order, seed)
        steps = self._bytes()
        unit = steps[0] / self._count
        self.sizes = tuple(Size(total + private_bytes, unit, private_bytes) for total in steps)

    def _bytes(self) -> list[int]:
        now = [self._stored(index, 0) for index in range(len(self._blocks))]
        done = [0] * len(now)
        totals = [sum(now)]
        for index in self.order.steps:
            done[index] += 1
            before, now[index] = now[index], self._stored(index, done[index])
            totals.append(totals[-1] + now[index] - before)
        return totals

    def _stored(self, block: int, merges: int) -> int:
        return sum(
            self._family.bytes(self._blocks[block].modules, group.tasks)
            for group in self._groups(block, merges)
        )

    def _groups(self, block: int, merges: int) -> tuple[Shared, ...]:
        sequence = self.order.sequences[block][:merges]
        similarity = {merge.union: merge.similarity for merge in sequence}
        return tuple(
            Shared(tasks, similarity.get(tasks)) for tasks in partition(sequence, self._count)
        )

    def at(self, step: int) -> list[tuple[Shared, ...]]:
        """The groups of each block after so many merges."""
        done = [0] * len(self._blocks)
        for index in self.order.steps[:step]:
            done[index] += 1
        return [self._groups(index, merges) for index, merges in enumerate(done)]

    def first(self, target: Target) -> int:
        """The first step whose size `target` holds: the fewest merges that do.

        Raises:
            ConfigError: there is none, or it is above the size at which nothing is shared.
        """
        if not target.within(self.sizes):
            raise ConfigError([out_of_reach(target, self.sizes)], "this FlexMerge")
        return next(step for step, size in enumerate(self.sizes) if target.holds(size))
