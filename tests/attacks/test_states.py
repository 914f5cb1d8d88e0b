"""States of `MergeCheckpoints` of unknown origin: nothing that they name is removed."""

from __future__ import annotations

import copy
import os
import warnings
from contextlib import suppress

import pytest
import torch

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError, MergekitExtError, MergeWarning
from tests.attacks.weights import joined
from tests.callbacks.small import llama, lora_model, spread
from tests.models import state as weights


def collecting(where, steps=(), **more):
    callback = MergeCheckpoints("linear", where=where, **more)
    model = llama()
    for step in steps:
        spread(model, 0.1, seed=step)
        callback.on_step_end(step, model)
    return callback


def names(folder):
    return sorted(place.name for place in folder.iterdir())


@pytest.mark.parametrize("claims", ["step", "elsewhere", "dotted", "other step", "link"])
@pytest.mark.parametrize("own", [True, False], ids=["own folder", "other folder"])
@pytest.mark.parametrize("on", ["step", "save"])
def test_folders_that_a_state_names_stay(tmp_path, claims, own, on):
    run, elsewhere = tmp_path / "run", tmp_path / "victim"
    llama().save_pretrained(tmp_path / "checkpoint")
    state = collecting(run, (1,)).state_dict()
    victim = {
        "step": elsewhere / "step-00000001",
        "elsewhere": elsewhere,
        "dotted": run / ".." / "victim" / "step-00000001",
        "other step": run / "notes",
        "link": run / "step-00000001",
    }[claims]
    if claims == "link":
        elsewhere.mkdir()
        (run / "step-00000001").rename(run / "notes")
        victim.symlink_to(elsewhere)
    victim.mkdir(parents=True, exist_ok=True)
    (victim / "thesis.txt").write_text("x")
    state |= {"folder": str(run if own else elsewhere), "snapshots": {1: str(victim)}}
    callback = MergeCheckpoints("linear", keep=1, where=run, on=on)
    with suppress(MergekitExtError), warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        callback.load_state_dict(state)
        for step in (2, 3):  # what is there may be another run's for them
            callback.on_step_end(step, llama())
            callback.on_save(step, tmp_path / "checkpoint")
    assert (victim / "thesis.txt").read_text() == "x"


def test_what_lies_beside_the_snapshots_stays(tmp_path):
    """Steps are written with eight digits: other names are not of a run."""
    state = collecting(tmp_path, (1,)).state_dict()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("step-5", "step-000000007", "step-٠٠٠٠٠٠٠٩", "step-00000002x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000008").symlink_to(elsewhere)
    (tmp_path / "step-00000003").mkdir()
    before = names(tmp_path)
    MergeCheckpoints("linear", where=tmp_path).load_state_dict(state)
    assert names(tmp_path) == [name for name in before if name != "step-00000003"]


def test_the_snapshots_of_another_run_stay_and_are_not_merged(tmp_path):
    one, other = collecting(tmp_path / "a", (1, 2)), collecting(tmp_path / "b", (1, 2, 3))
    for state in (one.state_dict(), collecting(tmp_path / "c").state_dict()):
        wrong = MergeCheckpoints("linear", where=tmp_path / "b")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            wrong.load_state_dict(state)
        assert wrong.steps == () and len(names(tmp_path / "b")) == 3
        with pytest.raises(ConfigError, match="3 snapshots of another run, such as step-00000003"):
            wrong.on_step_end(3, llama())
    assert len(names(tmp_path / "a")) == 2 and other.steps == (1, 2, 3)


def test_a_folder_called_initial_stays_unless_it_is_ours(tmp_path):
    theirs = tmp_path / "initial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="of another run, such as initial"):
        MergeCheckpoints("ties", where=tmp_path).on_train_begin(0, llama())
    assert (theirs / "thesis.txt").read_text() == "x"
    callback, model = MergeCheckpoints("ties", where=tmp_path / "run"), llama()
    callback.on_train_begin(0, model)
    spread(model, 0.1)
    callback.on_train_begin(0, model)  # begins anew
    kept = weights(tmp_path / "run/initial")["lm_head.weight"]
    assert torch.equal(kept, model.lm_head.weight)


NESTED = {"tensors": {"w": torch.zeros(2)}, "config": None, "steps": [1]}
SPOILT = {
    "saves nothing": {"saves": None},
    "saves a text": {"saves": "x"},
    "saves true": {"saves": True},
    "snapshots a list": {"snapshots": []},
    "snapshots by letters": {"snapshots": {"a": "b"}},
    "snapshot a number": {"snapshots": {1: 1}},
    "a long step": {"snapshots": {10**8: "x"}},
    "folder a number": {"folder": 3},
    "initial a text": {"initial": "initial"},
    "steps a text": {"mean": {**NESTED, "steps": "12"}},
    "steps of texts": {"mean": {**NESTED, "steps": ["1"]}},
    "no tensors": {"mean": {**NESTED, "tensors": {"w": 3}}},
    "config a list": {"mean": {**NESTED, "config": [1]}},
    "names are numbers": {"mean": {**NESTED, "tensors": {1: torch.zeros(1)}}},
    "something else": {"more": 1},
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_state_of_other_types_is_one_error(case):
    callback = MergeCheckpoints("average")
    before = copy.deepcopy(callback.state_dict())
    with pytest.raises(ConfigError, match="found") as raised:
        callback.load_state_dict({**before, **SPOILT[case]})
    assert len(raised.value.problems) == 1 and len(str(raised.value)) < 1000
    assert callback.state_dict() == before


@pytest.mark.parametrize("state", [[1], None, {}, {"method": "linear"}, {1: 2}], ids=repr)
def test_what_is_no_state_is_one_error(state):
    with pytest.raises(ConfigError, match="state"):
        MergeCheckpoints("linear").load_state_dict(state)


@pytest.mark.parametrize(
    "config", [None, {}, {"peft_type": "LORA"}, {"peft_type": "LORA", "r": "x"}, {"peft_type": []}]
)
@pytest.mark.parametrize("make", [llama, lora_model])
def test_the_mean_of_another_model_is_an_error_in_the_first_step(make, config):
    callback = MergeCheckpoints("average")
    mean = {**NESTED, "config": config}
    callback.load_state_dict({**callback.state_dict(), "mean": mean})
    with pytest.raises(ConfigError, match=r"new, missing or of another shape|state\.mean"):
        callback.on_step_end(2, make())


def test_a_pipe_is_no_checkpoint(tmp_path):
    """Opening one would wait for its other end."""
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="not a regular file"):
        MergeCheckpoints("linear", on="save").on_save(1, tmp_path)


def test_a_file_of_other_tensors_is_no_checkpoint(tmp_path):
    llama().save_pretrained(tmp_path)
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    (tmp_path / "model.safetensors").write_bytes(joined({"w": entry}, bytes(8)))
    with pytest.raises(ConfigError, match=r"12 tensors .* missing"):
        MergeCheckpoints("linear", on="save").on_save(1, tmp_path)
