"""Ranks and scalings against PEFT's own resolution."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from mergekit_ext.errors import ConfigError
from peft_merge.io.names import (
    Targets,
    either,
    qualified,
    scaling,
)
from peft_merge.io.read import load_adapter
from tests.peft_merge.edit import change_config

PARTS = st.sampled_from(["layers", "1", "11", "q", "qq", "x.q"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
KEYS = st.one_of(NAMES, NAMES.map(lambda name: f"^{name}"), st.sampled_from([".*q", "1|q", "l.*"]))


@given(
    ranks=st.dictionaries(KEYS, st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(KEYS, st.integers(1, 9), max_size=4),
    rslora=st.booleans(),
    name=NAMES,
)
def test_patterns_resolve_as_peft_resolves_them(ranks, alphas, rslora, name):
    config = {
        "r": 5,
        "lora_alpha": 7,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
    }
    rank = ranks.get(get_pattern_key(list(ranks), name), 5)
    alpha = alphas.get(get_pattern_key(list(alphas), name), 7)
    expected = alpha / (math.sqrt(rank) if rslora else rank)
    assert scaling(config, name) == (rank, expected)


@given(
    chosen=st.one_of(st.lists(NAMES, max_size=3), KEYS),
    excluded=st.one_of(st.none(), st.lists(NAMES, max_size=2), KEYS),
    layers=st.one_of(st.none(), st.integers(0, 12), st.lists(st.sampled_from([1, 11]), max_size=2)),
    pattern=st.sampled_from([None, [], "layers", ["q", "layers"]]),
    name=NAMES,
)
@settings(max_examples=150)
def test_modules_are_adapted_as_peft_tells(chosen, excluded, layers, pattern, name):
    config = {
        "target_modules": chosen,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    expected = check_target_module_exists(SimpleNamespace(**config), name)
    assert Targets(config).adapt(name) == bool(expected)


@given(names=st.lists(NAMES, min_size=1, max_size=3, unique=True), other=NAMES)
def test_one_key_for_several_modules_matches_these_only(names, other):
    key = either(qualified(name) for name in names)
    assert (get_pattern_key([key], other) == key) == (other in names)


def test_names_with_special_characters_are_themselves():
    for name in ("a+b.c", "blocks[0]", "layers.1"):
        assert scaling({"r": 1, "rank_pattern": {qualified(name): 3}}, name)[0] == 3
    assert scaling({"r": 1, "rank_pattern": {qualified("layers.1"): 3}}, "layers11")[0] == 1


def test_a_key_that_is_literally_the_name_counts_though_it_matches_nothing():
    assert scaling({"r": 1, "rank_pattern": {"a+b": 3}}, "a+b")[0] == 3


@pytest.mark.parametrize(
    ("entries", "module", "leaves"),
    [
        (["experts.up"], "layers.0.experts", ["up"]),
        (["experts.up"], "experts", ["up"]),
        (["experts.up"], "my_experts", []),
        (["experts.up", "experts.down"], "layers.0.experts", ["down", "up"]),
        (["up"], "anything", ["up"]),
        (["up"], "layers.0.q_proj", []),
        (None, "experts", []),
    ],
)
def test_target_parameters_of_a_module(entries, module, leaves):
    config = {"target_parameters": entries, "target_modules": ["q_proj"]}
    assert Targets(config).parameters(module) == leaves


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"experts.down_proj": 2}},
        {"alpha_pattern": {"experts.down_proj": 2}},
        {"target_parameters": ["experts.down_proj"]},
    ],
    ids=str,
)
def test_factors_of_parameters_that_files_do_not_tell_apart(fields, adapter_folder):
    folder = change_config(adapter_folder("nested_parameters"), **fields)
    with pytest.raises(ConfigError, match="stacks of factors for down_proj"):
        load_adapter(folder)


def test_many_parameters_and_modules_take_no_time():
    names = [f"layers.{index}.experts" for index in range(4_000)]
    started = time.process_time()
    targets = Targets(
        {"target_modules": names, "target_parameters": [f"{name}.up" for name in names]}
    )
    assert all(map(targets.adapt, names))
    assert not any(map(targets.parameters, names))
    assert time.process_time() - started < 10  # a minute when each looks at all others


def test_a_key_for_parameters_matches_these_only():
    key = qualified("experts", ["up", "down"])
    for name, rank in (("experts.up", 3), ("experts.down", 3), ("experts.gate", 1)):
        assert scaling({"r": 1, "rank_pattern": {key: 3}}, name)[0] == rank


# --- expressions of a configuration


def test_long_expressions_that_name_modules_are_taken(adapter_folder):
    key = either(qualified(f"layers.{index}.experts.gate_proj") for index in range(1_000))
    load_adapter(change_config(adapter_folder("plain"), rank_pattern={key: 8}))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "a|" * 600_000 + "q_proj"},
        {"rank_pattern": {"a|" * 300_000 + "b": 8, "b|" * 300_000 + "a": 8}},
        {"target_parameters": [f"experts.p{index}" for index in range(65)]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_configurations_that_would_take_minutes_are_refused(fields, adapter_folder):
    with pytest.raises(ConfigError, match="at most"):
        load_adapter(change_config(adapter_folder("plain"), **fields))


def test_a_pattern_of_layers_is_one_where_peft_puts_it(adapter_folder):
    fields = {"layers_pattern": ["(?P<idx>h)"], "layers_to_transform": [0]}
    with pytest.raises(ConfigError, match=r"layers_pattern.*a regular expression"):
        load_adapter(change_config(adapter_folder("plain"), **fields))


@pytest.mark.parametrize("key", ["(?i)q_proj", "(" * 5000 + ")" * 5000, "a{99999999999999999999}"])
def test_what_python_does_not_compile_is_no_expression(key, adapter_folder):
    folder = change_config(adapter_folder("plain"), rank_pattern={key: 4})
    with pytest.raises(ConfigError, match="rank_pattern"):
        load_adapter(folder)
