"""Configurations: everything that is wrong, at once, before any work."""

from __future__ import annotations

import re

import pytest

from mergekit_ext.errors import ConfigError, MergeError, TwoModelsWarning
from peft_merge.flexmerge.family import blocks_of
from peft_merge.merge import check, merge_adapters
from tests.peft_merge.loras import adapter, update
from tests.peft_merge.models import KINDS, saved


def adapters(count=3, names=None):
    names = names or [f"t{i}" for i in range(count)]
    return [adapter(name, {"m": update(i, 2)}) for i, name in enumerate(names)]


def refused(sources, **parameters):
    arguments = parameters.pop("arguments", {})
    with pytest.raises(ConfigError) as error:
        merge_adapters(sources, "flexmerge", parameters=parameters, **arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "parameters.target_size: found nothing"),
        ({"target_size": "much"}, "'40MB'"),
        ({"target_size": True}, "a number of adapters"),
        ({"target_size": 0}, "a number of adapters"),
        ({"target_size": 0.5}, "1 to 3 adapters"),
        ({"target_size": 4}, "Write 3,"),
        ({"target_size": "10B"}, "bytes and more"),
        ({"target_size": [1, 2]}, "one value for the whole merge"),
        ({"target_size": {"value": 2, "filter": "m"}}, "one value for the whole merge"),
        ({"target_size": (2, 1)}, "one value for the whole merge"),
        ({"target_size": 2, "linkage": "single"}, "average"),
        ({"target_size": 2, "order": "best"}, "greedy"),
        ({"target_size": 2, "granularity": "head"}, "layer"),
        ({"target_size": 2, "algorithm": "tyes"}, "Write `ties`"),
        ({"target_size": 2, "algorithm": "ties", "mu": 1}, "does not have"),
        ({"target_size": 2, "algorithm": "lore"}, "exactly one of mu"),
        ({"target_size": 2, "densty": 1}, "does not have"),
    ],
)
def test_wrong_parameters(given, said):
    assert said in refused(adapters(), **given)


def test_a_wrong_algorithm_hides_nothing_else():
    wrong = {"rank": 99, "patterns": True, "space": "dleta", "modules_to_save": "drop"}
    parameters = {"algorithm": "tyes", "density": 0.5, "lambda": 1, "order": "best"}
    text = refused(adapters(names=["a.b", "c"]), target_size=2, **parameters, arguments=wrong)
    for said in ("Write `ties`", "greedy", "rank: found 99", "space:"):
        assert said in text
    assert "modules_to_save:" in text and "'a.b'" in text and "6 problems" in text


def test_sizes_below_one_take_a_smaller_rank():
    unlike = [adapter("t0", {"m": update(1, 1)}), adapter("t1", {"m": update(2, 5)})]
    text = refused(unlike, target_size=1.1, arguments={"patterns": True})
    assert "A smaller `rank`" in text
    small = {"target_size": 0.5}
    assert "set `patterns: true`" in refused(adapters(), **small, arguments={"rank": 1})
    made = merge_adapters(adapters(), "flexmerge", parameters=small, rank=1, patterns=True)
    assert made.report["size"]["adapters"] <= 0.5


def test_a_group_without_a_mean_stops_the_merge():
    with pytest.raises(MergeError, match="weights that sum to 0"):
        merge_adapters(adapters(2), "flexmerge", weights=[1, -1], parameters={"target_size": 1})


def test_names_of_tasks_are_folders_and_adapters():
    text = refused(adapters(names=["a.b", "lora", "Same", "same", "keys"]), target_size=2)
    for part in ("'a.b'", "'lora'", "'same' beside 'Same'", "'keys'"):
        assert part in text
    assert "4 problems" in text


def test_heads_are_not_merged(tmp_path):
    sources = [saved(KINDS["modules_to_save"], tmp_path / f"t{i}", i) for i in range(2)]
    text = refused(sources, target_size=1, arguments={"modules_to_save": "average"})
    assert "every task keeps its own" in text
    sources[1] = saved(KINDS["lora_bias"], tmp_path / "biased", 3)
    assert "lora_bias" in refused(sources, target_size=2)


def test_two_adapters_around_an_estimated_base_are_reported():
    options = {"algorithm": "lore", "base": "estimated", "mu": 0.1, "target_size": 2}
    with pytest.warns(TwoModelsWarning):
        merge_adapters(adapters(), "flexmerge", parameters=options)


def test_checked_without_reading_factors(tmp_path):
    saved(KINDS["plain"], tmp_path / "t0", 1)
    saved(KINDS["plain"], tmp_path / "t1", 2)
    document = {
        "merge_method": "flexmerge",
        "models": [{"model": str(tmp_path / name)} for name in ("t0", "t1")],
        "parameters": {"target_size": 1.5, "lambda": 0.9},
    }
    assert check(document).request.method == "flexmerge"
    document["parameters"]["target_size"] = 0.9
    with pytest.raises(ConfigError, match=re.escape("1 to 2 adapters")):
        check(document)


def test_blocks():
    modules = [
        "model.layers.10.q",
        "model.layers.2.q",
        "model.layers.2.mlp.experts",
        "model.layers.2.mlp.experts.base_layer",
        "head",
        "att",
        "att.base_layer.out_proj",
    ]
    by_module = blocks_of(modules, "module")
    assert [block.name for block in by_module] == [
        "att",
        "head",
        "model.layers.2.mlp.experts",
        "model.layers.2.q",
        "model.layers.10.q",
    ]
    assert by_module[0].modules == ("att", "att.base_layer.out_proj")
    assert len(by_module[2].modules) == 2
    by_layer = blocks_of(modules, "layer")
    assert [block.name for block in by_layer] == [
        "att",
        "head",
        "model.layers.2",
        "model.layers.10",
    ]
    assert sorted(m for block in by_layer for m in block.modules) == sorted(modules)
