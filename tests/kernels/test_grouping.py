from __future__ import annotations

import itertools
import math
import time
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import squareform

from mergekit_ext.kernels.grouping import (
    LINKAGES,
    ORDERS,
    Merge,
    dendrogram,
    kmeans_groups,
    merge_order,
    partition,
)
from mergekit_ext.kernels.similarity import Gram, cosines
from tests.reference.grouping import merge_steps

SCIPY = {"min": "complete", "average": "average", "max": "single"}


def symmetric(values, count):
    matrix = torch.eye(count, dtype=torch.float64)
    for (i, j), value in zip(itertools.combinations(range(count), 2), values, strict=True):
        matrix[i, j] = matrix[j, i] = value
    return matrix


def random_block(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = count * (count - 1) // 2
    return symmetric(torch.rand(pairs, generator=generator, dtype=torch.float64) * 2 - 1, count)


@st.composite
def blocks(draw, few_values=True):
    """Blocks of one number of tasks; with few values there are many ties."""
    count = draw(st.integers(1, 6))
    entry = st.sampled_from([-1.0, -0.1, 0.0, 0.1, 0.3, 1 / 3, 0.7, 1.0])
    if not few_values:
        entry = st.floats(-1, 1)
    # What `cosines` gives: then the mean of pairs is exact before it is rounded, here as there.
    entry = entry.map(lambda value: round(value * 2**36) / 2**36)
    pairs = count * (count - 1) // 2
    matrices = st.lists(entry, min_size=pairs, max_size=pairs).map(lambda v: symmetric(v, count))
    return draw(st.lists(matrices, min_size=1, max_size=4))


def steps_of(found):
    """The order in the form of the reference."""
    following = [iter(sequence) for sequence in found.sequences]
    steps = [(block, next(following[block])) for block in found.steps]
    assert not any(list(rest) for rest in following)
    return [(block, merge.first, merge.second, merge.similarity) for block, merge in steps]


@pytest.mark.parametrize("order", ["greedy", "left_to_right", "right_to_left"])
@pytest.mark.parametrize("linkage", LINKAGES)
@given(st.one_of(blocks(), blocks(few_values=False)))
def test_against_the_search_over_all_blocks_and_pairs(linkage, order, matrices):
    wanted = merge_steps(matrices, linkage, order)
    found = steps_of(merge_order(matrices, linkage, order))
    assert found == wanted


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("count", [2, 5, 12])
def test_against_scipy(linkage, count):
    for seed in range(5):
        block = random_block(count, seed)
        found = dendrogram(block, linkage)
        distances = squareform((1 - block).numpy(), checks=False)
        groups = {(task,) for task in range(count)}
        tree = scipy_linkage(distances, SCIPY[linkage])
        members = [(task,) for task in range(count)]
        for merge, (a, b, distance, _) in zip(found, tree, strict=True):
            pair = sorted([members[int(a)], members[int(b)]])
            assert [merge.first, merge.second] == pair
            assert merge.similarity == pytest.approx(1 - distance, abs=1e-12)
            members.append(tuple(sorted(pair[0] + pair[1])))
            groups = (groups - set(pair)) | {members[-1]}
        assert groups == {tuple(range(count))}


@given(st.integers(0, 10**6), st.permutations(range(6)), st.sampled_from(list(LINKAGES)))
def test_permuting_tasks_permutes_groups(seed, order, linkage):
    block = random_block(6, seed)
    permuted = block[order][:, order]  # task k is the old task order[k]
    for applied in range(6):
        plain = partition(dendrogram(block, linkage)[:applied], 6)
        moved = partition(dendrogram(permuted, linkage)[:applied], 6)
        back = sorted(tuple(sorted(order[task] for task in group)) for group in moved)
        assert back == list(plain)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_duplicates_merge_first(linkage):
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(3, 50, generator=generator)
    gram = Gram(6)
    gram.add([vectors[i] for i in (0, 1, 0, 2, 1, 0)])
    merges = dendrogram(cosines(gram.value), linkage)
    assert [(m.first, m.second) for m in merges[:3]] == [((0,), (2,)), ((0, 2), (5,)), ((1,), (4,))]
    assert [m.similarity for m in merges[:3]] == [1.0] * 3
    assert merges[3].similarity < 1
    assert partition(merges[:3], 6) == ((0, 2, 5), (1, 4), (3,))


def test_all_equal_similarities_follow_the_task_order():
    merges = dendrogram(torch.ones(4, 4))
    assert [(m.first, m.second) for m in merges] == [
        ((0,), (1,)),
        ((0, 1), (2,)),
        ((0, 1, 2), (3,)),
    ]


def test_one_task_has_no_merges():
    found = merge_order([torch.ones(1, 1)] * 3)
    assert found.sequences == ((), (), ()) and found.steps == ()
    assert partition((), 1) == ((0,),)


def test_blocks_may_have_different_numbers_of_tasks():
    found = merge_order([torch.ones(1, 1), random_block(3, 0), random_block(5, 1)])
    assert [len(sequence) for sequence in found.sequences] == [0, 2, 4]
    assert sorted(found.steps) == [1] * 2 + [2] * 4


def test_a_sequence_is_never_reordered():
    rising = (Merge((0,), (1,), 0.1), Merge((0, 1), (2,), 0.9))
    assert ORDERS["greedy"]([rising, (Merge((0,), (1,), 0.5),)], 0) == (1, 0, 0)


def test_means_of_equal_values_are_that_value():
    # In float arithmetic 0.1 + 0.1 + 0.1 is not three times 0.1, on the grid it is.
    value = round(0.1 * 2**36) / 2**36
    merges = dendrogram(symmetric([value] * 45, 10), "average")
    assert {merge.similarity for merge in merges} == {value}


def test_equal_similarities_follow_the_block_order():
    one = (Merge((0,), (1,), 0.5),)
    assert ORDERS["greedy"]([one, one, one], 0) == (0, 1, 2)
    assert ORDERS["right_to_left"]([one, (), one, one], 0) == (3, 2, 0)


@given(blocks(), st.integers(0, 5))
def test_random_orders_are_whole_and_repeatable(matrices, seed):
    count = len(matrices[0])
    found = merge_order(matrices, order="random", seed=seed)
    assert found == merge_order(matrices, order="random", seed=seed)
    assert sorted(found.steps) == sorted(list(range(len(matrices))) * (count - 1))
    for block, sequence in zip(matrices, found.sequences, strict=True):
        assert partition(sequence, count) == (tuple(range(count)),)
        for merge in sequence:
            assert merge.first[0] < merge.second[0]
            assert merge.similarity == min(
                float(block[i, j]) for i in merge.first for j in merge.second
            )


def test_random_orders_differ_between_seeds_and_blocks():
    matrices = [torch.ones(8, 8)] * 3
    found = [merge_order(matrices, order="random", seed=seed) for seed in range(3)]
    assert len({order.steps for order in found}) == 3
    assert len({sequence for order in found for sequence in order.sequences}) == 9


def test_every_first_pair_is_drawn():
    first = {dendrogram(torch.ones(4, 4), generator=Random(seed))[0] for seed in range(200)}
    assert len(first) == 6


@given(blocks())
def test_partition_counts_down(matrices):
    count = len(matrices[0])
    merges = dendrogram(matrices[0])
    for applied in range(count):
        groups = partition(merges[:applied], count)
        assert len(groups) == count - applied
        assert sorted(itertools.chain(*groups)) == list(range(count))
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)


def test_wrong_inputs_are_refused():
    block = random_block(3, 0)
    block[0, 1] = block[1, 0] = torch.nan
    for wrong in (block, torch.tensor([[1.0, 0.2], [0.3, 1.0]])):
        with pytest.raises(ValueError, match="symmetric matrix without NaN"):
            dendrogram(wrong)
    with pytest.raises(ValueError, match="not both"):
        partition([Merge((0, 1), (2,), 0.5)], 3)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_many_blocks_of_many_tasks_are_no_wait(linkage):
    matrices = [random_block(30, seed) for seed in range(20)]
    start = time.process_time()
    found = merge_order(matrices, linkage)
    assert time.process_time() - start < 2.0  # 0.04 s where this was written
    assert len(found.steps) == 20 * 29
    similarities = [step[3] for step in steps_of(found)]
    assert np.all(np.diff(similarities) <= 1e-12)


# --- K-means --------------------------------------------------------------------------------


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
