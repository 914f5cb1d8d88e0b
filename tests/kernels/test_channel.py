from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from mergekit_ext.kernels.channel import kmeans_groups


def vectors(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def inertia(x, groups):
    """The objective of K-means on unit vectors, from the vectors."""
    unit = x / x.norm(dim=1, keepdim=True)
    return sum(float((unit[list(g)] - unit[list(g)].mean(0)).square().sum()) for g in groups)


def all_partitions(items, clusters):
    """Every way to put the items into as many non-empty groups."""
    for labels in itertools.product(range(clusters), repeat=len(items)):
        if len(set(labels)) == clusters:
            yield [
                [i for i, own in zip(items, labels, strict=True) if own == c]
                for c in range(clusters)
            ]


@given(st.integers(1, 9), st.data())
def test_exactly_k_groups_of_all_tasks(count, data):
    clusters = data.draw(st.integers(1, count))
    x = vectors(count, data.draw(st.integers(1, 5)), data.draw(st.integers(0, 99)))
    x[data.draw(st.integers(0, count - 1))] = 0.0
    x[-1] = x[0]
    groups = kmeans_groups(x @ x.T, clusters)
    assert len(groups) == clusters and all(groups)
    assert sorted(itertools.chain(*groups)) == list(range(count))
    assert list(groups) == sorted(groups)
    assert groups == kmeans_groups(x @ x.T, clusters)


@given(st.integers(0, 50), st.integers(1, 5))
def test_the_best_of_all_partitions_is_found(seed, clusters):
    x = vectors(5, 3, seed)
    best = min(inertia(x, groups) for groups in all_partitions(range(5), clusters))
    assert inertia(x, kmeans_groups(x @ x.T, clusters)) <= best + 1e-9


@pytest.mark.parametrize("clusters", [2, 5, 9])
def test_every_vector_is_with_the_nearest_centre(clusters):
    x = vectors(30, 6, clusters)
    groups = kmeans_groups(x @ x.T, clusters)
    unit = x / x.norm(dim=1, keepdim=True)
    distances = torch.cdist(unit, torch.stack([unit[list(g)].mean(0) for g in groups]))
    for cluster, group in enumerate(groups):
        assert (distances[list(group)].argmin(dim=1) == cluster).all()


@pytest.mark.parametrize("clusters", [2, 5, 9])
def test_about_as_good_as_scipy(clusters):
    x = vectors(30, 6, clusters)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    best = math.inf
    for seed in range(30):
        _, labels = kmeans2(unit, clusters, minit="++", iter=50, rng=seed)
        groups = [[i for i in range(30) if labels[i] == c] for c in range(clusters)]
        if all(groups):
            best = min(best, inertia(x, groups))
    assert inertia(x, kmeans_groups(x @ x.T, clusters)) <= 1.03 * best


def test_plain_clusters_are_found_whatever_the_lengths():
    centres = 5 * vectors(3, 40, 1)
    own = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    x = centres[own] + 0.1 * vectors(8, 40, 2)
    wanted = ((0, 3, 6, 7), (1, 4), (2, 5))
    assert kmeans_groups(x @ x.T, 3, seed=4) == wanted
    x = x * torch.tensor([1e-6, 1.0, 1e6, 3.0, 0.2, 7.0, 1e3, 1.0])[:, None]
    assert kmeans_groups(x @ x.T, 3) == wanted


def test_equal_vectors_still_make_k_groups():
    assert len(kmeans_groups(torch.ones(5, 5), 3)) == 3
    assert len(kmeans_groups(torch.zeros(5, 5), 5)) == 5


def test_wrong_inputs_are_refused():
    for clusters in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            kmeans_groups(torch.eye(3), clusters)
    with pytest.raises(ValueError, match="not finite"):
        kmeans_groups(torch.full((2, 2), torch.nan), 1)
