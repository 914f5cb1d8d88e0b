"""Who shares what at a target size: against a search over everything."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.errors import ConfigError
from mergekit_ext.flexmerge.plan import Clusters, Dendrograms
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.kernels.grouping import LINKAGES, ORDERS
from tests.flexmerge.inputs import layout
from tests.reference.flexmerge import Stored, algorithm_1

ITEM = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2}


@st.composite
def problems(draw):
    """Tasks, blocks of several sizes, dtypes, and similarities with many ties."""
    tasks = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    seed = draw(st.integers(0, 10**6))
    steps = draw(st.sampled_from([2, 4, 1000]))
    kinds = draw(
        st.one_of(
            st.just([torch.float32] * (tasks + 1)),
            st.lists(st.sampled_from(list(ITEM)), min_size=tasks + 1, max_size=tasks + 1),
        )
    )
    generator = random.Random(seed)
    cosines = []
    for _ in sizes:
        matrix = torch.eye(tasks, dtype=torch.float64)
        for i in range(tasks):
            for j in range(i):
                matrix[i, j] = matrix[j, i] = generator.randint(-steps, steps) / steps
        cosines.append(matrix)
    return sizes, kinds, cosines


def block_bytes(planner):
    """The bytes of the blocks, before the first merge and after each."""
    return tuple(size.bytes - size.private_bytes for size in planner.trajectory)


def storage(sizes, kinds, masks=False, forced=None) -> Storage:
    shapes = {f"b{i}.w": (size,) for i, size in enumerate(sizes)}
    states = [{n: torch.zeros(s, dtype=kind) for n, s in shapes.items()} for kind in kinds]
    return Storage(layout(states[0], states[1:]), masks, forced)


def stored(sizes, kinds) -> list[Stored]:
    return [Stored(size, [ITEM[k] for k in kinds[1:]], ITEM[kinds[0]]) for size in sizes]


def expanded(groups, masks):
    """As they are stored: masked pairs are kept apart."""
    found = []
    for group in groups:
        found += [(task,) for task in group] if masks and len(group) == 2 else [group]
    return sorted(found)


@given(problems(), st.booleans(), st.sampled_from(["min", "average", "max"]), st.floats(0, 1))
def test_the_plan_is_that_of_algorithm_1(problem, masks, linkage, share):
    sizes, kinds, cosines = problem
    blocks = stored(sizes, kinds)
    # With masks the least size need not be the last.
    _, trajectory = algorithm_1(cosines, blocks, -1, masks=masks, linkage=linkage)
    target = min(trajectory) + int(share * (trajectory[0] - min(trajectory)))
    wanted, on_the_way = algorithm_1(cosines, blocks, target, masks=masks, linkage=linkage)
    planner = Dendrograms(storage(sizes, kinds, masks), cosines, linkage)
    plan = planner.plan(Target(bytes=target))
    assert plan.size.bytes == on_the_way[-1] <= target
    assert [[g.tasks for g in groups] for groups in plan.groups] == [
        expanded(groups, masks) for groups in wanted
    ]
    for groups in plan.groups:
        for group in groups:
            assert (group.kind == "masked") == (masks and len(group.tasks) > 1)
            assert (group.similarity is None) == (len(group.tasks) == 1)
    # In models: as many bytes as the mean input.
    unit = sum(blocks_whole(blocks)) / (len(kinds) - 1)
    assert plan.size.models == pytest.approx(on_the_way[-1] / unit)
    again = Target(models=plan.size.models)
    assert planner.plan(again).size.bytes <= plan.size.bytes


def blocks_whole(blocks):
    return [block.elements * sum(block.item) for block in blocks]


@given(problems(), st.sampled_from(list(ORDERS)), st.booleans())
def test_every_order_ends_with_one_group_and_never_depends_on_the_target(problem, order, masks):
    sizes, kinds, cosines = problem
    made = [Dendrograms(storage(sizes, kinds, masks), cosines, "min", order, 7) for _ in range(2)]
    assert made[0].trajectory == made[1].trajectory
    last = len(made[0].trajectory) - 1
    assert last == len(sizes) * (len(kinds) - 2)
    tasks = tuple(range(len(kinds) - 1))
    assert made[0].at(0).size.models == pytest.approx(len(tasks))
    assert {g.tasks for groups in made[0].at(0).groups for g in groups} == {(t,) for t in tasks}
    if not masks:
        assert [[g.tasks for g in groups] for groups in made[0].at(last).groups] == [
            [tasks] for _ in sizes
        ]
        # One merge after the other only ever joins.
        for step in range(last):
            fine, coarse = made[0].at(step), made[1].at(step + 1)
            for before, after in zip(fine.groups, coarse.groups, strict=True):
                for group in before:
                    assert any(set(group.tasks) <= set(other.tasks) for other in after)


def test_orders_by_hand():
    apart = torch.tensor([[1.0, 0.1], [0.1, 1.0]], dtype=torch.float64)
    close = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    cosines = [apart, close, apart]
    kept = storage([10, 10, 10], [torch.float32] * 3)
    target = Target(models=5 / 3)
    merged = {
        order: [len(g) == 1 for g in Dendrograms(kept, cosines, "min", order).plan(target).groups]
        for order in ("greedy", "left_to_right", "right_to_left")
    }
    assert merged == {
        "greedy": [False, True, False],
        "left_to_right": [True, False, False],
        "right_to_left": [False, False, True],
    }
    drawn = {
        tuple(map(len, Dendrograms(kept, cosines, "min", "random", seed).plan(target).groups))
        for seed in range(30)
    }
    assert len(drawn) == 3


def test_linkages_by_hand():
    """0 and 1 are close; 2 is close to 1 and far from 0."""
    matrix = torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.8], [0.1, 0.8, 1]], dtype=torch.float64)
    kept = storage([8], [torch.float32] * 4)
    for linkage in LINKAGES:
        plan = Dendrograms(kept, [matrix], linkage).at(2)
        assert plan.groups[0][0].similarity == pytest.approx(
            {"min": 0.1, "average": 0.45, "max": 0.8}[linkage]
        )


def test_masks_are_counted():
    """Four of 20 elements: one unified vector, the base once, 3 bytes of masks each."""
    same = torch.ones(4, 4, dtype=torch.float64)
    planner = Dendrograms(storage([20], [torch.float32] * 5, masks=True), [same])
    # A pair is kept as it is; a group of three replaces three copies by two and its masks.
    assert block_bytes(planner) == (320, 320, 80 + 80 + 9 + 80, 80 + 80 + 12)
    assert planner.plan(Target(models=4)).groups[0] == planner.at(0).groups[0]


def test_two_masked_groups_share_one_base():
    near = torch.full((6, 6), 0.1, dtype=torch.float64)
    near[:3, :3] = near[3:, 3:] = 0.9
    near.fill_diagonal_(1.0)
    planner = Dendrograms(storage([16], [torch.float32] * 7, masks=True), [near])
    assert block_bytes(planner)[4] == 64 * 2 + 64 + 6 * 2
    assert [g.tasks for g in planner.at(4).groups[0]] == [(0, 1, 2), (3, 4, 5)]


def test_masks_that_cost_more_than_they_save_do_not_hide_smaller_sizes():
    """bfloat16 models over a float32 base: three masked are larger than three kept apart."""
    kinds = [torch.float32, *[torch.bfloat16] * 3]
    same = torch.ones(3, 3, dtype=torch.float64)
    planner = Dendrograms(storage([80], kinds, masks=True), [same])
    assert block_bytes(planner)[0] == 480 < block_bytes(planner)[-1] == 160 + 320 + 30
    plan = planner.plan(Target(models=3.0))
    assert [g.tasks for g in plan.groups[0]] == [(0,), (1,), (2,)]


@pytest.mark.parametrize("written", [0.9, 0.999, 3.001, 4, "10B", "319B"])
def test_sizes_out_of_reach(written):
    same = torch.ones(3, 3, dtype=torch.float64)
    planner = Dendrograms(storage([80], [torch.float32] * 4), [same])
    with pytest.raises(ConfigError) as caught:
        planner.plan(Target.parse(written))
    (problem,) = caught.value.problems
    assert problem.where == "parameters.target_size"
    assert ("320 bytes" if isinstance(written, str) else "1 to 3") in problem.expected
    assert not planner.reaches(Target.parse(written))


@given(problems(), st.booleans())
def test_the_smallest_size_that_an_error_names_can_be_had(problem, masks):
    sizes, kinds, cosines = problem
    planner = Dendrograms(storage(sizes, kinds, masks), cosines)
    for target in (Target(models=1e-6), Target(bytes=0)):
        with pytest.raises(ConfigError) as caught:
            planner.plan(target)
        named = caught.value.problems[0].remedy.split()[1].strip("'")
        assert planner.plan(Target.parse(named if target.bytes is not None else float(named)))


def test_private_tensors_come_on_top_of_models_but_count_as_bytes():
    states = [{"a.w": torch.zeros(10), "head.weight": torch.zeros(5)} for _ in range(3)]
    kept = Storage(layout(states[0], states[1:]))
    planner = Dendrograms(kept, [torch.eye(2, dtype=torch.float64)])
    plan = planner.plan(Target(models=1.0))
    assert (plan.size.models, plan.size.bytes, plan.size.private_bytes) == (1.0, 80, 40)
    assert len(planner.plan(Target(bytes=119)).groups[0]) == 1
    assert len(planner.plan(Target(bytes=120)).groups[0]) == 2
    with pytest.raises(ConfigError, match="80 bytes"):
        planner.plan(Target(bytes=79))


def test_a_dtype_for_the_output_changes_bytes_not_models():
    planner = Dendrograms(
        storage([80], [torch.float32] * 3, forced=torch.bfloat16),
        [torch.eye(2, dtype=torch.float64)],
    )
    assert block_bytes(planner) == (320, 160)
    assert planner.plan(Target(models=2)).size.models == 2.0


def clusters(count=4):
    near = torch.full((count, count), 0.1, dtype=torch.float64)
    near[:2, :2] = near[2:, 2:] = 0.9
    near.fill_diagonal_(1.0)
    return Clusters(storage([10, 20], [torch.float32] * (count + 1)), [near, near], 0)


def test_channel_merging_takes_whole_numbers():
    planner = clusters()
    plan = planner.plan(Target(models=2.0))
    assert [[g.tasks for g in groups] for groups in plan.groups] == [[(0, 1), (2, 3)]] * 2
    assert plan.size.models == 2.0
    for number in (1, 3, 4):
        assert planner.plan(Target(models=float(number))).size.models == number
    for wrong in (Target(models=2.5), Target(models=5.0), Target(models=0.5), Target(bytes=200)):
        with pytest.raises(ConfigError, match="whole number of models from 1 to 4"):
            planner.plan(wrong)
