"""Which groups of tasks to merge in which block, and in which order.

FlexMerge (Algorithm 1) starts from every task alone in every block and merges, again and again,
the two most similar groups of one block. A block does not depend on the others: each has its own
sequence of merges, its dendrogram, and the global order interleaves the sequences; neither depends
on the target size. Channel Merging, the baseline of FlexMerge, clusters by K-means instead.
"""

import heapq
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mergekit_ext.kernels.similarity import cosines as cosines_of

Group = tuple[int, ...]
Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

# With ten, one block of six vectors in sixty missed the optimum of K-means, with thirty none.
_RESTARTS = 30
_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Merge:
    """Two groups of tasks, indices in ascending order, of one block become one."""

    first: Group  # holds the smallest index of both
    second: Group
    similarity: float

    @property
    def union(self) -> Group:
        return tuple(sorted(self.first + self.second))


Sequences = Sequence[Sequence[Merge]]


@dataclass(frozen=True)
class MergeOrder:
    """The merges of each block, and for each global step the index of the block that merges."""

    sequences: tuple[tuple[Merge, ...], ...]
    steps: tuple[int, ...]


def _mean(values: Collection[float]) -> float:
    # fsum does not depend on the order of its terms, so neither do ties.
    return math.fsum(values) / len(values)


# Similarity of two groups from the cosines of all pairs across them. The paper's is the minimum
# (equation 1), which it calls single linkage; in clustering that is complete linkage.
LINKAGES: Mapping[str, Callable[[Collection[float]], float]]
LINKAGES = {"min": min, "average": _mean, "max": max}


def dendrogram(
    cosines: Tensor, linkage: str = "min", generator: random.Random | None = None
) -> tuple[Merge, ...]:
    r"""Return the m - 1 merges of one block: always of the two most similar groups.

    The similarity of groups A and B is the minimum, mean or maximum of :math:`c_{ij}`, i in A,
    j in B (FlexMerge, equation 1 and the ablation of section 4.3), over the original task vectors.
    Of several most similar pairs, the one whose first group holds the smallest task index is taken,
    then the one whose second group does.

    Args:
        cosines: (m, m), symmetric, without NaN; `ValueError` for others.
        linkage: a name in `LINKAGES`.
        generator: draws the pairs (the paper's ablation); similarities are reported, not used.
    """
    matrix: Matrix = cosines.detach().to("cpu", torch.float64).numpy()
    if not np.array_equal(matrix, matrix.T):
        raise ValueError("cosines: expected a symmetric matrix without NaN")
    count, link = len(matrix), LINKAGES[linkage]
    rows: list[list[float]] = matrix.tolist()
    # A group goes by its smallest task index.
    members: dict[int, Group] = {task: (task,) for task in range(count)}
    # Above the diagonal, in the row of the first group: similarities of the groups that are
    # left. The first maximum in reading order is the one that the rule for ties asks for.
    similarities = np.where(np.tri(count, dtype=bool), -np.inf, matrix)
    merges = []
    for _ in range(count - 1):
        if generator is None:
            first, second = divmod(int(similarities.argmax()), count)
        else:
            first, second = sorted(generator.sample(sorted(members), 2))
        merge = Merge(members[first], members.pop(second), float(similarities[first, second]))
        merges.append(merge)
        members[first] = union = merge.union
        similarities[second, :] = similarities[:, second] = -np.inf
        for other, tasks in members.items():
            if other != first:
                across = [rows[one][task] for one in union for task in tasks]
                similarities[min(first, other), max(first, other)] = link(across)
    return tuple(merges)


def partition(merges: Sequence[Merge], count: int) -> tuple[Group, ...]:
    """Return the groups of `count` tasks after the first `merges` of a block, in order.

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


def _greedy(sequences: Sequences, seed: int) -> tuple[int, ...]:
    # Only each block's next merge competes: similarities within a block may rise.
    heads = ([(-m.similarity, block) for m in merges] for block, merges in enumerate(sequences))
    return tuple(block for _, block in heapq.merge(*heads))


def _left_to_right(sequences: Sequences, seed: int) -> tuple[int, ...]:
    return tuple(block for block, merges in enumerate(sequences) for _ in merges)


def _shuffled(sequences: Sequences, seed: int) -> tuple[int, ...]:
    steps = list(_left_to_right(sequences, seed))
    random.Random(seed).shuffle(steps)
    return tuple(steps)


# How merges are ordered across blocks (section 4.3): the most similar of the blocks' next merges,
# of equal ones that of the first block ("greedy", Algorithm 1); one block after the other; or every
# interleaving alike, for which pairs are drawn within each block too ("random").
ORDERS: Mapping[str, Callable[[Sequences, int], tuple[int, ...]]] = {
    "greedy": _greedy,
    "left_to_right": _left_to_right,
    "right_to_left": lambda sequences, seed: _left_to_right(sequences, seed)[::-1],
    "random": _shuffled,
}


def merge_order(
    cosines_per_block: Sequence[Tensor], linkage: str = "min", order: str = "greedy", seed: int = 0
) -> MergeOrder:
    """Return every merge of every block, in order: Algorithm 1 run to the end.

    Args:
        cosines_per_block: for each block a matrix for `dendrogram`.
        linkage: a name in `LINKAGES`.
        order: a name in `ORDERS`; ``random`` also draws the pairs within each block.
        seed: for ``random``; the same seed gives the same order.
    """
    seeds = random.Random(seed)

    def drawing() -> random.Random | None:
        return random.Random(seeds.getrandbits(64)) if order == "random" else None

    sequences = tuple(dendrogram(block, linkage, drawing()) for block in cosines_per_block)
    return MergeOrder(sequences, ORDERS[order](sequences, seed))


def kmeans_groups(gram: Tensor, clusters: int, seed: int = 0) -> tuple[Group, ...]:
    r"""Return the clusters of K-means over the m task vectors of a block.

    Zhang et al., "Channel Merging: Preserving Specialization for Merged Experts" (AAAI 2025), in
    the form of FlexMerge section 4.2: the same K for all layers. Minimises
    :math:`\sum_C \sum_{i \in C} \| u_i - \bar u_C \|^2` with the unit vectors
    :math:`u_i = t_i / \|t_i\|`, whose squared distances are :math:`2 - 2 \cos(t_i, t_j)`. The
    distance to a centre is :math:`c_{ii} - 2 \, \mathrm{mean}_{j \in C} \, c_{ij} +
    \mathrm{mean}_{j, k \in C} \, c_{jk}`, so the cosines are all that is needed. Lloyd's iteration
    from k-means++ centres, the best of thirty starts.

    `gram` holds the (m, m) finite inner products (`similarity.Gram`), `clusters` is the number K of
    groups, 1 to m. Task indices and groups are in ascending order; none is empty.

    A cluster that loses all its members takes the vector that is farthest from its own centre (the
    papers do not say). Zero vectors are as in `similarity.cosines`.
    """
    similarity: Matrix = cosines_of(gram).cpu().numpy()
    generator = random.Random(seed)
    best: Labels | None = None
    lowest = np.inf
    for _ in range(_RESTARTS):
        labels = _lloyd(similarity, _start(similarity, clusters, generator), clusters)
        inertia = float(_own(_distances(similarity, labels, clusters), labels).sum())
        # A start counts as better only by more than rounding: the first of equal ones stays.
        if best is None or inertia < lowest - 1e-12:
            best, lowest = labels, inertia
    assert best is not None
    groups = [tuple(np.flatnonzero(best == cluster).tolist()) for cluster in range(clusters)]
    return tuple(sorted(groups))


def _start(similarity: Matrix, clusters: int, generator: random.Random) -> Labels:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next centre by its squared distance."""
    count = len(similarity)
    centres = [generator.randrange(count)]
    while len(centres) < clusters:
        nearest = np.maximum(2 - 2 * similarity[:, centres].max(axis=1), 0.0)
        # All that is left may coincide with a centre; then any of them will do.
        chances = nearest if nearest.any() else np.ones(count)
        chances[centres] = 0.0
        centres.append(generator.choices(range(count), weights=chances.tolist())[0])
    labels = similarity[:, centres].argmax(axis=1)
    # A vector equal to an earlier centre may itself be a centre.
    labels[centres] = np.arange(clusters)
    return labels


def _lloyd(similarity: Matrix, labels: Labels, clusters: int) -> Labels:
    for _ in range(_MOST_ROUNDS):
        distances = _distances(similarity, labels, clusters)
        own = _own(distances, labels)
        # Staying wins a tie, or two equal centres could swap members for ever.
        found = np.where(distances.min(axis=1) < own - 1e-12, distances.argmin(axis=1), labels)
        _fill_empty(found, _own(distances, found), clusters)
        if np.array_equal(found, labels):
            break
        labels = found
    return labels


def _distances(similarity: Matrix, labels: Labels, clusters: int) -> Matrix:
    """Squared distances of m vectors to the centres of K non-empty clusters, (m, K)."""
    member: Matrix = np.eye(clusters)[labels]
    weights = member / member.sum(axis=0)
    towards = similarity @ weights
    centres = (weights * towards).sum(axis=0)
    return similarity.diagonal()[:, None] - 2 * towards + centres


def _own(distances: Matrix, labels: Labels) -> Matrix:
    return distances[np.arange(len(labels)), labels]


def _fill_empty(labels: Labels, own: Matrix, clusters: int) -> None:
    for cluster in range(clusters):
        sizes: npt.NDArray[Any] = np.bincount(labels, minlength=clusters)
        if sizes[cluster]:
            continue
        farthest = int(np.where(sizes[labels] > 1, own, -np.inf).argmax())
        labels[farthest] = cluster
        own[farthest] = 0.0
