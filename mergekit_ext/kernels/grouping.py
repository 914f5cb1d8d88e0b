"""Which groups of tasks to merge in which block, and in which order.

FlexMerge (Algorithm 1) starts from every task alone in every block and merges, again and again,
the two groups of one block that are most similar, over all blocks. What happens in a block does
not depend on the other blocks. So each block has its own sequence of merges, its dendrogram, and
the global order only interleaves the sequences; neither depends on the target size.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_T = TypeVar("_T")
Group = tuple[int, ...]


@dataclass(frozen=True)
class Merge:
    """Two groups of tasks of one block become one.

    Attributes:
        first: task indices in ascending order; holds the smallest index of both groups.
        second: task indices in ascending order.
        similarity: of the two groups, by the linkage that was used.
    """

    first: Group
    second: Group
    similarity: float

    @property
    def union(self) -> Group:
        """The merged group."""
        return tuple(sorted(self.first + self.second))


@dataclass(frozen=True)
class MergeOrder:
    """The merges of all blocks, in order.

    Attributes:
        sequences: for each block its merges.
        steps: for each global step the index of a block, which then does its next merge.
    """

    sequences: tuple[tuple[Merge, ...], ...]
    steps: tuple[int, ...]


def _mean(values: Collection[float]) -> float:
    # fsum does not depend on the order of its terms, so neither do ties. Cosines on the grid of
    # `similarity.cosines` have exact sums: then the mean is rounded once and never rises.
    return math.fsum(values) / len(values)


# Similarity of two groups from the cosines of all pairs across them. The paper's is the minimum
# (equation 1), which it calls single linkage; in clustering that is complete linkage.
LINKAGES: Mapping[str, Callable[[Collection[float]], float]] = MappingProxyType(
    {"min": min, "average": _mean, "max": max}
)


def dendrogram(cosines: Tensor, linkage: str = "min") -> tuple[Merge, ...]:
    r"""Return the m - 1 merges of one block: always of the two most similar groups.

    The similarity of groups A and B is the minimum, mean or maximum of :math:`c_{ij}`, i in A,
    j in B (FlexMerge, equation 1 and the ablation of section 4.3), always over the original task
    vectors. Of several most similar pairs, the one whose first group holds the smallest task
    index is taken, then the one whose second group does.

    Args:
        cosines: (m, m), symmetric, without NaN.
        linkage: a name in `LINKAGES`.

    Raises:
        ValueError: an unknown linkage, or a matrix that is not as said.
    """
    groups = _Groups(cosines, linkage)
    return tuple(groups.merge(*groups.most_similar()) for _ in range(groups.count - 1))


def random_dendrogram(cosines: Tensor, linkage: str = "min", seed: int = 0) -> tuple[Merge, ...]:
    """Return m - 1 merges of two groups at random, every pair alike (the paper's ablation).

    Arguments and errors are those of `dendrogram`; the similarities are reported, not used.
    """
    groups, generator = _Groups(cosines, linkage), random.Random(seed)
    merges = []
    for _ in range(groups.count - 1):
        first, second = sorted(generator.sample(sorted(groups.members), 2))
        merges.append(groups.merge(first, second))
    return tuple(merges)


class _Groups:
    """The groups of one block. A group goes by its smallest task index."""

    def __init__(self, cosines: Tensor, linkage: str):
        matrix: npt.NDArray[np.float64] = cosines.detach().to("cpu", torch.float64).numpy()
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ValueError(f"cosines have the shape {matrix.shape}; expected (m, m), m >= 1")
        if np.isnan(matrix).any():
            raise ValueError("cosines hold NaN; expected task vectors that are finite")
        if not np.array_equal(matrix, matrix.T):
            raise ValueError("cosines are not symmetric")
        self.count = len(matrix)
        self.members: dict[int, Group] = {task: (task,) for task in range(self.count)}
        self._link = _named(LINKAGES, linkage, "linkage")
        self._cosines: list[list[float]] = matrix.tolist()
        # Above the diagonal, in the row of the first group: similarities of the groups that are
        # left. The first maximum in reading order is the one that the rule for ties asks for.
        self._similarities = np.where(np.tri(self.count, dtype=bool), -np.inf, matrix)

    def most_similar(self) -> tuple[int, int]:
        first, second = divmod(int(self._similarities.argmax()), self.count)
        return first, second

    def merge(self, first: int, second: int) -> Merge:
        done = Merge(
            self.members[first],
            self.members.pop(second),
            float(self._similarities[first, second]),
        )
        self.members[first] = done.union
        self._similarities[second, :] = -np.inf
        self._similarities[:, second] = -np.inf
        rows = [self._cosines[task] for task in done.union]
        for other, tasks in self.members.items():
            if other != first:
                across = [row[task] for row in rows for task in tasks]
                self._similarities[min(first, other), max(first, other)] = self._link(across)
        return done


def partition(merges: Sequence[Merge], count: int) -> tuple[Group, ...]:
    """Return the groups of `count` tasks after `merges`, sorted by their smallest member.

    Args:
        merges: the first merges of a block's sequence; none, some or all of them.

    Raises:
        ValueError: a merge joins groups that do not exist at that point.
    """
    groups: set[Group] = {(task,) for task in range(count)}
    for merge in merges:
        if not {merge.first, merge.second} <= groups:
            raise ValueError(f"{merge.first} and {merge.second} are not both among {groups}")
        groups -= {merge.first, merge.second}
        groups.add(merge.union)
    return tuple(sorted(groups))


Sequences = Sequence[Sequence[Merge]]


def _greedy(sequences: Sequences, seed: int) -> tuple[int, ...]:
    # Only each block's next merge competes: a sequence whose similarities rise somewhere (a mean of
    # cosines that are not on a grid may, by a rounding) keeps its order.
    waiting = [
        (-merges[0].similarity, block, 0) for block, merges in enumerate(sequences) if merges
    ]
    heapq.heapify(waiting)
    steps = []
    while waiting:
        _, block, position = waiting[0]
        steps.append(block)
        following = position + 1
        if following < len(sequences[block]):
            entry = (-sequences[block][following].similarity, block, following)
            heapq.heapreplace(waiting, entry)
        else:
            heapq.heappop(waiting)
    return tuple(steps)


def _left_to_right(sequences: Sequences, seed: int) -> tuple[int, ...]:
    return tuple(block for block, merges in enumerate(sequences) for _ in merges)


def _right_to_left(sequences: Sequences, seed: int) -> tuple[int, ...]:
    return _left_to_right(sequences, seed)[::-1]


def _shuffled(sequences: Sequences, seed: int) -> tuple[int, ...]:
    steps = list(_left_to_right(sequences, seed))
    random.Random(seed).shuffle(steps)
    return tuple(steps)


def _most_similar_first(cosines: Tensor, linkage: str, seed: int) -> tuple[Merge, ...]:
    return dendrogram(cosines, linkage)


@dataclass(frozen=True)
class Order:
    """How merges are ordered: across blocks, and which pairs within one."""

    interleave: Callable[[Sequences, int], tuple[int, ...]]
    pairs: Callable[[Tensor, str, int], tuple[Merge, ...]] = _most_similar_first


# The merge orders of the paper's ablation (section 4.3); "greedy" is Algorithm 1.
ORDERS: Mapping[str, Order] = MappingProxyType(
    {
        "greedy": Order(_greedy),
        "left_to_right": Order(_left_to_right),
        "right_to_left": Order(_right_to_left),
        "random": Order(_shuffled, random_dendrogram),
    }
)


def interleave(sequences: Sequences, order: str = "greedy", seed: int = 0) -> tuple[int, ...]:
    """Return the global order: block indices, each standing for that block's next merge.

    Args:
        sequences: for each block its merges; they keep their order.
        order: ``greedy`` (the most similar of the blocks' next merges; of equal ones that of the
            first block), ``left_to_right`` and ``right_to_left`` (one block after the other), or
            ``random`` (every interleaving alike).
        seed: for ``random``.

    Raises:
        ValueError: an unknown order.
    """
    return _named(ORDERS, order, "order").interleave(sequences, seed)


def merge_order(
    cosines_per_block: Sequence[Tensor],
    linkage: str = "min",
    order: str = "greedy",
    seed: int = 0,
) -> MergeOrder:
    """Return every merge of every block, in order: Algorithm 1 run to the end.

    Args:
        cosines_per_block: for each block an (m, m) matrix; m may differ between blocks.
        linkage: a name in `LINKAGES`.
        order: a name in `ORDERS`; ``random`` also draws the pairs within each block.
        seed: for ``random``; the same seed gives the same order.

    Raises:
        ValueError: an unknown name, or a matrix that `dendrogram` refuses.
    """
    pairs = _named(ORDERS, order, "order").pairs
    seeds = random.Random(seed)
    sequences = tuple(pairs(block, linkage, seeds.getrandbits(64)) for block in cosines_per_block)
    return MergeOrder(sequences, interleave(sequences, order, seed))


def _named(registry: Mapping[str, _T], name: str, what: str) -> _T:
    if name not in registry:
        raise ValueError(f"{what} is {name!r}; expected one of {', '.join(registry)}")
    return registry[name]
