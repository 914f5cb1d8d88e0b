"""What is wrong with the arguments of MergeCheckpoints is an error before training."""

from __future__ import annotations

import pytest

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError
from tests.callbacks.small import Net, llama


class Late:
    def on_merge_end(self): ...


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        (
            {"keep": 0, "every": 1.5, "on": "epoch", "keep_better": True},
            "keep every on keep_better",
        ),
        ({"where": 3, "start": True, "load": "no", "task": 3}, "where start task load"),
        ({"metric": 4, "seed": "x", "parametrs": {}}, "metric seed parametrs"),
        (
            {"evaluate": lambda model: 1.0, "log": Late(), "callbacks": [Late()]},
            "evaluate log callbacks",
        ),
        ({"callbacks": Late(), "method": ["lore"]}, "method callbacks"),
        ({"adapter_options": {"rnk": 3}, "parameters": [1]}, "parameters adapter_options.rnk"),
        (
            {"method": "ema", "parameters": {"decay": 2, "beta": 1}, "base": "initial"},
            "parameters.decay parameters.beta base",
        ),
        ({"method": "average", "on": "save"}, "on"),
    ],
)
def test_all_problems_at_once(arguments, places):
    with pytest.raises(ConfigError) as caught:
        MergeCheckpoints(**arguments)
    assert {p.where for p in caught.value.problems} == set(places.split())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nan_tie", {}, "Write `nan_ties`"),
        ("lore", {"parameters": {"mu": "a", "rank": 3}}, r"(?s)2 problems.*mu.*rank"),
        ("lore", {}, "none of mu, mu_relative, rank_ratio"),
        ("slerp", {"parameters": {"t": 0.5}}, "found 6 models"),
        ("linear", {"base": "nowhere"}, "base_model: found .*nowhere"),
        ("peft_ties", {}, "merge_method: found 'peft_ties'"),
        ("flexmerge", {}, "method: found 'flexmerge'; expected a method that makes one model"),
    ],
)
def test_problems_of_the_method_come_before_training(method, options, message):
    with pytest.raises(ConfigError, match=message):
        MergeCheckpoints(method, **options).on_train_begin(0, llama())


def test_only_models_of_transformers_are_saved():
    with pytest.raises(ConfigError, match=r"model: found a Net; .* Use `average` or `ema`"):
        MergeCheckpoints("linear").on_step_end(1, Net())


@pytest.mark.parametrize("where", ["file", "file/folder"])
def test_a_folder_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"where: .*expected a (writable )?folder"):
        MergeCheckpoints("linear", where=tmp_path / where).on_train_begin(0, llama())


def test_loading_on_several_machines_needs_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"where: found no folder"):
        MergeCheckpoints("average", load=True).on_train_begin(0, Net())
    MergeCheckpoints("average", load=True, where=tmp_path).on_train_begin(0, Net())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    MergeCheckpoints("average", load=True).on_train_begin(0, Net())


def test_parameters_that_are_divided_among_processes_are_refused():
    model = llama()
    model.lm_head.weight.ds_id = 1  # as ZeRO-3 marks them
    with pytest.raises(ConfigError, match=r'FSDP or ZeRO-3.*on="save"'):
        MergeCheckpoints("average").on_step_end(1, model)
    MergeCheckpoints("linear", on="save").on_train_begin(0, model)
    for use in ({"load": True}, {"evaluate": lambda model, task: 1.0}):
        with pytest.raises(ConfigError, match="without `load` and `evaluate`"):
            MergeCheckpoints("linear", on="save", **use).on_train_begin(0, model)
