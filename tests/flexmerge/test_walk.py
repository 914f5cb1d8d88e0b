"""The walk against the checkpoints that a merge writes at the same sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.merging import Walk
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.flexmerge.storage import Target
from mergekit_ext.host.flexmerge import prepare
from mergekit_ext.host.flexmerge.engine import Engine, open_inputs
from mergekit_ext.host.session import Session
from tests.models import bert, config, family, llama, state

OPTIONS = MergeOptions(quiet=True)
COUNT = 4


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("llamas")
    return family(folder, llama, torch.bfloat16, amounts=(0.01, 0.02, 0.04, 0.03))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Blocks that hold several dtypes, and models that disagree about them."""
    base, models = family(
        tmp_path_factory.mktemp("mixed"), bert, torch.bfloat16, amounts=(0.01, 0.02, 0.04, 0.03)
    )
    for index, folder in enumerate((base, *models)):
        wide = torch.float64 if index == 3 else torch.float32
        tensors = {
            name: tensor.to(wide if name.endswith("bias") else tensor.dtype)
            for name, tensor in state(folder).items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return base, models


def content(
    inputs: tuple[Path, Sequence[Path]], parameters: Mapping[str, Any], **keys: Any
) -> dict[str, Any]:
    base, models = inputs
    return config("flexmerge", models, base, {"target_size": 3.0, **parameters}, **keys)


def engine(document: Mapping[str, Any], folder: Path) -> Engine:
    report, prepared = prepare.check(MergeConfiguration.model_validate(document), OPTIONS)
    assert prepared is not None, report.problems
    return Engine(prepared, open_inputs(prepared)[0], folder, Session(), folder / "scratch")


def walk_of(made: Engine) -> Walk:
    return Walk(made.reader, made.merging)


def some_plans(made: Engine, number: int = 5) -> list[Plan]:
    """From everything kept apart to the smallest."""
    sizes = made.planner.sizes
    last = len(sizes) - 1
    chosen = sorted({round(i * last / (number - 1)) for i in range(number)})
    return [made.planner.plan(Target(models=sizes[i])) for i in chosen]


def written(made: Engine, plan: Plan, out: Path) -> list[dict[str, Tensor]]:
    """What a merge of that plan writes, task by task."""
    out.mkdir()
    size = made.write(out, plan).size
    assert (size.bytes, size.models) == (plan.size.bytes, plan.size.models)
    checkpoint = open_checkpoint(out)
    return [dict(checkpoint.tensors(task)) for task in checkpoint.tasks]


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        # Bits, not values: -0.0 is not 0.0.
        ours, theirs = found[name].contiguous(), tensor.contiguous()
        assert torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize(
    "parameters",
    [
        {"algorithm": "task_arithmetic"},
        {"algorithm": "ties"},
        {"algorithm": "ties", "trim_scope": "tensor", "order": "random"},
        {"algorithm": "ties", "out_dtype": "float32"},
        {"algorithm": "tsv_m"},
        {"algorithm": "emr"},
        {"algorithm": "emr", "out_dtype": "float32"},
        {"algorithm": "residual"},
        {"algorithm": "residual", "base": "ties", "out_dtype": "bfloat16"},
        {"algorithm": "consensus"},
        {"algorithm": "average", "dare_density": 0.5},
        {"algorithm": "channel_merging"},
        {"algorithm": "nan", "granularity": "layer"},
    ],
    ids=lambda parameters: "-".join(map(str, parameters.values())),
)
@pytest.mark.parametrize("inputs", ["llamas", "mixed"])
def test_every_size_is_the_checkpoint_of_that_size(
    inputs: str, parameters: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    keys = {name: value for name, value in parameters.items() if name == "out_dtype"}
    own = {name: value for name, value in parameters.items() if name not in keys}
    made = engine(content(request.getfixturevalue(inputs), own, **keys), tmp_path)
    walk = walk_of(made)
    for number, plan in enumerate(some_plans(made, 4)):
        walk.go(plan)
        expected = written(made, plan, tmp_path / str(number))
        for task in range(COUNT):
            # Twice, with the other tasks in between: nothing may be lent from a buffer.
            assert_same(walk.tensors(task), expected[task])
        assert_same(walk.tensors(0), expected[0])
    assert number >= 2


def test_what_was_read_before_stays(llamas: Any, tmp_path: Path) -> None:
    made = engine(content(llamas, {"algorithm": "emr"}), tmp_path)
    walk = walk_of(made)
    held, copies = [], []
    for plan in some_plans(made):
        walk.go(plan)
        for task in range(COUNT):
            tensors = walk.tensors(task)
            held.append(tensors)
            copies.append({name: tensor.clone() for name, tensor in tensors.items()})
    for block in made.reader.layout.blocks:  # the reader's memory is written over
        made.reader.read(block).base.fill_(7.0)
    for before, now in zip(copies, held, strict=True):
        assert_same(now, before)
    for task in range(COUNT):  # what is masked is made again
        assert_same(walk.tensors(task), copies[task - COUNT])


def test_at_full_size_they_are_the_inputs_own(mixed: Any, tmp_path: Path) -> None:
    made = engine(content(mixed, {"algorithm": "emr"}), tmp_path)
    walk = walk_of(made)
    walk.go(made.planner.plan(Target(models=float(COUNT))))
    for task, folder in enumerate(mixed[1]):
        assert_same(walk.tensors(task), state(folder))


def test_a_group_has_one_storage_and_others_have_none_in_common(
    llamas: Any, tmp_path: Path
) -> None:
    made = engine(content(llamas, {"algorithm": "task_arithmetic"}), tmp_path)
    walk = walk_of(made)
    plan = some_plans(made)[2]
    walk.go(plan)
    tensors = [walk.tensors(task) for task in range(COUNT)]
    assert any(1 < len(groups) < COUNT for groups in plan.groups)
    for block, groups in zip(made.reader.layout.blocks, plan.groups, strict=True):
        owner = {task: group.tasks for group in groups for task in group.tasks}
        for part in block.parts:
            where = [t[part.name].untyped_storage().data_ptr() for t in tensors]
            for one in range(COUNT):
                for other in range(COUNT):
                    assert (where[one] == where[other]) == (owner[one] == owner[other])


@pytest.mark.parametrize("algorithm", ["task_arithmetic", "emr"])
def test_only_what_changed_is_merged(
    llamas: Any, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(content(llamas, {"algorithm": algorithm}), tmp_path)
    calls: list[tuple[str, tuple[int, ...]]] = []
    name = "merge_masked" if algorithm == "emr" else "merge"
    stock = getattr(made.prepared.algorithm, name)

    def spy(block: Any, members: Any, *rest: Any) -> Any:
        calls.append((block.layout.name, tuple(members)))
        return stock(block, members, *rest)

    monkeypatch.setattr(made.prepared.algorithm, name, spy)
    walk = walk_of(made)
    blocks = [block.name for block in made.reader.layout.blocks]
    before: dict[str, set[tuple[int, ...]]] = {block: set() for block in blocks}
    for plan in [made.planner.plan(Target(models=s)) for s in made.planner.sizes]:
        calls.clear()
        touched = walk.go(plan)
        now = {
            block: {group.tasks for group in groups if len(group.tasks) > 1}
            for block, groups in zip(blocks, plan.groups, strict=True)
        }
        expected = {(block, group) for block in blocks for group in now[block] - before[block]}
        assert set(calls) == expected and len(calls) == len(expected)
        # The first plan touches all, as there was nothing before.
        first = all(len(groups) == COUNT for groups in plan.groups)
        assert touched == (len(blocks) if first else sum(now[b] != before[b] for b in blocks))
        before = now
    calls.clear()
    assert walk.go(plan) == 0 and not calls


def test_it_can_go_back(llamas: Any, tmp_path: Path) -> None:
    made = engine(content(llamas, {"algorithm": "ties"}), tmp_path)
    walk = walk_of(made)
    plans = some_plans(made, 3)
    found = []
    for plan in (*plans, *reversed(plans)):
        walk.go(plan)
        found.append(walk.tensors(1))
    for there, back in zip(found[:3], reversed(found[3:]), strict=True):
        assert_same(back, there)


def test_a_merge_that_leaves_the_range_is_an_error(llamas: Any, tmp_path: Path) -> None:
    parameters = {"algorithm": "task_arithmetic", "lambda": 1e6}
    document = content(llamas, parameters, out_dtype="float16")
    made = engine(document, tmp_path)
    walk = walk_of(made)
    with pytest.raises(MergeError, match=r"not finite in torch\.float16"):
        walk.go(some_plans(made)[-1])
