"""Channel Merging's clusters of task vectors: the baseline that FlexMerge compares with.

Zhang et al., "Channel Merging: Preserving Specialization for Merged Experts" (AAAI 2025), in the
form of FlexMerge section 4.2: K-means in every layer, with the same K for all layers.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mergekit_ext.kernels.similarity import cosines

# With ten, one block of six vectors in sixty missed the optimum, with thirty none.
_RESTARTS = 30
_MOST_ROUNDS = 100
Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def kmeans_groups(gram: Tensor, clusters: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    r"""Return the clusters of K-means over the m task vectors of a block.

    Minimises :math:`\sum_C \sum_{i \in C} \| u_i - \bar u_C \|^2` with the unit vectors
    :math:`u_i = t_i / \|t_i\|`, whose squared distances are :math:`2 - 2 \cos(t_i, t_j)`. The
    distance to a centre is :math:`c_{ii} - 2 \, \mathrm{mean}_{j \in C} \, c_{ij} +
    \mathrm{mean}_{j, k \in C} \, c_{jk}`, so the cosines are all that is needed. Lloyd's iteration
    from k-means++ centres, the best of thirty starts.

    Args:
        gram: (m, m) inner products (`similarity.Gram`), finite.
        clusters: the number K of groups, 1 to m.
        seed: of the starts; the same seed gives the same groups.

    Returns:
        Exactly K groups, none empty: task indices in ascending order, the groups sorted by their
        smallest member.

    The papers do not say what happens to a cluster that loses all its members: it takes the vector
    that is farthest from its own centre. Zero vectors are as in `similarity.cosines`.

    Raises:
        ValueError: K is not in 1 to m, or the matrix is not finite.
    """
    count = len(gram)
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters is {clusters}; expected 1 to {count}, the number of tasks")
    similarity: Matrix = cosines(gram).cpu().numpy()
    if np.isnan(similarity).any():
        raise ValueError("the Gram matrix is not finite; expected task vectors that are finite")
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
