"""A run that is interrupted and resumed gives the same merge."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from mergekit_ext.callbacks import Evaluate, LogTo, MergeCheckpoints
from mergekit_ext.errors import ConfigError, MergeWarning
from tests.callbacks.small import Net, lora_model, same, spread


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(model, callback, numbers):
    for step in numbers:
        spread(model, 0.1, seed=step)
        callback.on_step_end(step, model)


CASES = {
    "memory": {"method": "ties", "keep": 3},
    "folder": {"method": "ties", "keep": 3, "where": "snapshots"},
    "average": {"method": "average"},
    "ema": {"method": "ema"},
}


@pytest.mark.parametrize("make", [Net, lora_model], ids=["full", "adapter"])
@pytest.mark.parametrize("case", CASES)
def test_resumed_runs_merge_the_same(tmp_path, monkeypatch, case, make):
    def new(part):
        (tmp_path / part).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / part)
        return MergeCheckpoints(**CASES[case])

    model = make()
    whole = new("whole")
    whole.on_train_begin(0, model)
    steps(model, whole, range(1, 7))

    model = make()
    first = new("parts")
    first.on_train_begin(0, model)
    steps(model, first, range(1, 5))
    state, saved = through_a_file(first.state_dict()), copy.deepcopy(model.state_dict())
    if case != "folder":
        steps(model, first, (5,))  # lost
    resumed = new("parts")
    resumed.load_state_dict(state)
    model.load_state_dict(saved)
    resumed.on_train_begin(4, model)
    steps(model, resumed, (5, 6))
    assert resumed.steps == whole.steps
    monkeypatch.chdir(tmp_path)
    same(resumed.merge().weights.tensors, whole.merge().weights.tensors)


def test_snapshots_made_after_the_state_was_saved_go(tmp_path):
    model = Net()
    first = MergeCheckpoints("linear", keep=3, where=tmp_path)
    steps(model, first, (1, 2, 3))
    state = through_a_file(first.state_dict())
    assert all(isinstance(path, str) for path in state["collected"]["kept"].values())
    steps(model, first, (4, 5))
    second = MergeCheckpoints("linear", keep=3, where=tmp_path)
    with pytest.warns(MergeWarning, match="2 of 3 snapshots are gone"):
        second.load_state_dict(state)
    assert second.steps == (3,)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    with pytest.raises(ConfigError, match="snapshots of another run, such as step-00000003"):
        MergeCheckpoints("linear", where=tmp_path).on_step_end(1, model)


def test_a_state_is_no_part_of_the_run_that_goes_on():
    model = Net()
    first = MergeCheckpoints("average")
    steps(model, first, (1, 2))
    state, expected = first.state_dict(), first.merge().weights.tensors
    steps(model, first, (3,))
    for _ in range(2):
        again = MergeCheckpoints("average")
        again.load_state_dict(state)
        steps(model, again, (3,))  # blends into its own copy
    last = MergeCheckpoints("average")
    last.load_state_dict(state)
    last.on_step_end(2, model)  # which is in the mean already
    assert last.steps == (1, 2)
    same(last.merge().weights.tensors, expected)


def test_the_state_of_another_folder_deletes_nothing(tmp_path):
    model = Net()
    one, other = (MergeCheckpoints("linear", where=tmp_path / name) for name in "ab")
    steps(model, one, (1, 2))
    steps(model, other, (3, 4))
    empty = MergeCheckpoints("linear", where=tmp_path / "c")
    for state in (one.state_dict(), empty.state_dict()):
        wrong = MergeCheckpoints("linear", where=tmp_path / "b")
        wrong.load_state_dict(state)
        assert len(list((tmp_path / "b").iterdir())) == 2
    with pytest.raises(ConfigError, match="2 snapshots of another run, such as step-00000003"):
        wrong.on_step_end(3, model)


def test_a_resumed_run_without_its_base_is_refused():
    with pytest.raises(ConfigError, match="load the state of the run that is resumed"):
        MergeCheckpoints("ties").on_train_begin(100, Net())
    with pytest.raises(ConfigError, match="found one of `average`"):
        MergeCheckpoints("ties").load_state_dict(MergeCheckpoints("average").state_dict())
    with pytest.raises(ConfigError, match="found one of `None`"):
        MergeCheckpoints("ties").load_state_dict({"step": 3})


def test_accelerate_saves_and_loads_the_state(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Net())
    mean, snapshots = MergeCheckpoints("average"), MergeCheckpoints("linear", keep=2)
    logged, scores = LogTo(accelerator), Evaluate(lambda model, task: 1.0, every=1)
    callbacks = [mean, snapshots, logged, scores]
    accelerator.register_for_checkpointing(*callbacks)
    for callback in callbacks:
        steps(model, callback, (1, 2, 3))
    expected = mean.merge().weights.tensors, snapshots.merge().weights.tensors
    accelerator.save_state(tmp_path / "state")
    for callback in callbacks:
        steps(model, callback, (4, 5))
    accelerator.load_state(tmp_path / "state")
    assert (mean.steps, snapshots.steps) == ((1, 2, 3), (2, 3))
    assert len(scores.found) == 3 and logged.state_dict() == {"step": 3}
    same(mean.merge().weights.tensors, expected[0])
    same(snapshots.merge().weights.tensors, expected[1])
