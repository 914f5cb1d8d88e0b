"""A run that is interrupted and resumed gives the same merge."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from mergekit_ext.callbacks import Evaluate, LogTo, MergeCheckpoints
from mergekit_ext.errors import ConfigError, MergeWarning
from tests.callbacks.small import Net, llama, lora_model, same, spread
from tests.models import state as weights


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(model, callback, numbers):
    for step in numbers:
        spread(model, 0.1, seed=step)
        callback.on_step_end(step, model)


@pytest.mark.parametrize(
    ("method", "make"),
    [("ties", llama), ("ties", lora_model), ("average", Net), ("ema", lora_model)],
)
def test_resumed_runs_merge_the_same(tmp_path, monkeypatch, method, make):
    def new(part):
        return MergeCheckpoints(method, keep=3, where=tmp_path / part)

    model = make()
    whole = new("whole")
    whole.on_train_begin(0, model)
    steps(model, whole, range(1, 7))

    model = make()
    first = new("parts")
    first.on_train_begin(0, model)
    steps(model, first, range(1, 5))
    state, saved = through_a_file(first.state_dict()), copy.deepcopy(model.state_dict())
    steps(model, first, (5,))  # lost, with the snapshot that had to go for it
    resumed = new("parts")
    if method == "ties":
        with pytest.warns(MergeWarning, match="1 of 3 snapshots are gone"):
            resumed.load_state_dict(state)
    else:
        resumed.load_state_dict(state)
    model.load_state_dict(saved)
    resumed.on_train_begin(4, model)
    steps(model, resumed, (5, 6))
    assert resumed.steps == whole.steps
    same(weights(resumed.merge().path), weights(whole.merge().path))


def test_snapshots_made_after_the_state_was_saved_go(tmp_path):
    model = llama()
    first = MergeCheckpoints("linear", keep=3, where=tmp_path)
    steps(model, first, (1, 2, 3))
    state = through_a_file(first.state_dict())
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
    state, expected = first.state_dict(), weights(first.merge().path)
    steps(model, first, (3,))
    for numbers in ((3,), (3,), (2,)):
        again = MergeCheckpoints("average")
        again.load_state_dict(state)
        steps(model, again, numbers)  # blends into its own copy
    assert again.steps == (1, 2)  # step 2 is in the mean already
    same(weights(again.merge().path), expected)


def test_a_resumed_run_needs_its_base_and_its_method():
    with pytest.raises(ConfigError, match="load the state of the run that is resumed"):
        MergeCheckpoints("ties").on_train_begin(100, llama())
    with pytest.raises(ConfigError, match="found one of `average`"):
        MergeCheckpoints("ties").load_state_dict(MergeCheckpoints("average").state_dict())


def test_accelerate_saves_and_loads_the_state(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(llama())
    mean, snapshots = (
        MergeCheckpoints("average"),
        MergeCheckpoints("linear", keep=2, where=tmp_path / "run"),
    )
    logged, scores = LogTo(accelerator), Evaluate(lambda model, task: 1.0, every=1)
    callbacks = [mean, snapshots, logged, scores]
    accelerator.register_for_checkpointing(*callbacks)
    for callback in callbacks:
        steps(model, callback, (1, 2, 3))
    expected = weights(mean.merge().path), weights(snapshots.merge().path)
    accelerator.save_state(tmp_path / "state")
    for callback in (mean, logged, scores):
        steps(model, callback, (4, 5))
    accelerator.load_state(tmp_path / "state")
    assert (mean.steps, snapshots.steps) == ((1, 2, 3), (2, 3))
    assert len(scores.found) == 3
    same(weights(mean.merge().path), expected[0])
    same(weights(snapshots.merge().path), expected[1])
