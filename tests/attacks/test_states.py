"""States of `MergeCheckpoints` from somebody else: nothing that they name is removed."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError, MergekitExtError
from tests.callbacks.small import Net, spread


def collecting(where, steps=(), **more):
    callback = MergeCheckpoints("linear", where=where, **more)
    model = Net()
    for step in steps:
        spread(model, 0.1, seed=step)
        callback.on_step_end(step, model)
    return callback


def names(folder):
    return sorted(place.name for place in folder.iterdir())


@pytest.mark.parametrize("claims", ["step", "elsewhere", "dotted", "other step", "link"])
@pytest.mark.parametrize("own", [True, False], ids=["own folder", "other folder"])
def test_folders_that_a_state_names_stay(tmp_path, claims, own):
    run, elsewhere = tmp_path / "run", tmp_path / "victim"
    collecting(run, (1,))
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
    collected = {"folder": str(run if own else elsewhere), "kept": {"1": str(victim)}}
    state = {"method": "linear", "saves": 0, "collected": collected, "base": None}
    callback = MergeCheckpoints("linear", keep=1, where=run)
    callback.load_state_dict(state)
    with suppress(MergekitExtError):  # what is there may be called another run's
        callback.on_step_end(2, Net())
        callback.on_step_end(3, Net())
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


def test_a_run_that_goes_on_elsewhere_leaves_the_snapshots_of_the_first(tmp_path):
    first = collecting(tmp_path / "a", (1, 2))
    second = MergeCheckpoints("linear", keep=2, where=tmp_path / "b")
    second.load_state_dict(first.state_dict())
    for step in (3, 4):
        second.on_step_end(step, Net())
    assert second.steps == (3, 4)
    assert names(tmp_path / "a") == ["step-00000001", "step-00000002"]


def test_a_folder_called_initial_stays_unless_it_is_ours(tmp_path):
    theirs = tmp_path / "initial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="initial, which another run may have left"):
        MergeCheckpoints("ties", where=tmp_path).on_train_begin(0, Net())
    assert (theirs / "thesis.txt").read_text() == "x"
    callback = MergeCheckpoints("ties", where=tmp_path / "run")
    callback.on_train_begin(0, Net())
    other = Net(seed=1)
    callback.on_train_begin(0, other)  # begins anew
    kept = load_file(tmp_path / "run" / "initial" / "model.safetensors")
    assert torch.equal(kept["first.weight"], other.first.weight)


FOLDER, MEMORY, MEAN = "folder", "memory", "mean"
NESTED = {"tensors": {"w": torch.zeros(2)}, "config": None, "folder": None}
SPOILT = {
    "nothing else": (MEMORY, {"saves": None, "collected": None}),
    "saves a text": (MEMORY, {"saves": "x"}),
    "saves true": (MEMORY, {"saves": True}),
    "kept a list": (FOLDER, {"collected": {"folder": "x", "kept": []}}),
    "kept by letters": (FOLDER, {"collected": {"folder": "x", "kept": {"a": "b"}}}),
    "kept a number": (FOLDER, {"collected": {"folder": "x", "kept": {"1": 1}}}),
    "kept a long step": (FOLDER, {"collected": {"folder": "x", "kept": {"9" * 5000: "x"}}}),
    "no folder": (FOLDER, {"collected": {"kept": {}}}),
    "folder a number": (FOLDER, {"collected": {"folder": 3, "kept": {}}}),
    "collected a list": (FOLDER, {"collected": [1]}),
    "of memory": (FOLDER, {"collected": {"1": NESTED}}),
    "of a folder": (MEMORY, {"collected": {"folder": "x", "kept": {"1": "x"}}}),
    "no tensors": (MEMORY, {"collected": {"1": {**NESTED, "tensors": {"w": 3}}}}),
    "config a list": (MEMORY, {"collected": {"1": {**NESTED, "config": [1]}}}),
    "names are numbers": (MEMORY, {"collected": {"1": {**NESTED, "tensors": {1: 2}}}}),
    "base a text": (MEMORY, {"base": "initial"}),
    "base without tensors": (MEMORY, {"base": {}}),
    "base nowhere": (MEMORY, {"base": {"path": "\0"}}),
    "base a number": (MEMORY, {"base": {"path": 3}}),
    "steps a text": (MEAN, {"collected": {"steps": "12", "mean": None, "dtypes": {}}}),
    "steps of texts": (MEAN, {"collected": {"steps": ["1"], "mean": NESTED, "dtypes": {}}}),
    "steps without a mean": (MEAN, {"collected": {"steps": [1], "mean": None, "dtypes": {}}}),
    "dtype a function": (
        MEAN,
        {"collected": {"steps": [1], "mean": NESTED, "dtypes": {"w": "load"}}},
    ),
    "dtype missing": (MEAN, {"collected": {"steps": [1], "mean": NESTED, "dtypes": {}}}),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_state_of_other_types_is_one_error(tmp_path, case):
    kind, changes = SPOILT[case]
    method = "average" if kind is MEAN else "linear"
    where = tmp_path if kind is FOLDER else "memory"
    callback = MergeCheckpoints(method, where=where)
    before = copy.deepcopy(callback.state_dict())
    with pytest.raises(ConfigError, match="found") as raised:
        callback.load_state_dict({**before, **changes})
    assert len(raised.value.problems) == 1 and len(str(raised.value)) < 1000
    assert callback.state_dict() == before


@pytest.mark.parametrize("state", [[1], None, {}, {"method": "linear"}, {1: 2}], ids=repr)
def test_what_is_no_state_is_one_error(state):
    with pytest.raises(ConfigError, match="state"):
        MergeCheckpoints("linear").load_state_dict(state)
