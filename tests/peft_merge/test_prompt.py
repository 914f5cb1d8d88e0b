"""Expressions of a configuration that would never end are refused; others mean what PEFT means."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from mergekit_ext.errors import ConfigError
from peft_merge import prompt
from peft_merge.io import load_adapter
from peft_merge.patterns import either, qualified, scaling
from tests.peft_merge.edit import change_config

Make = Callable[..., Path]
ENDLESS = r"(\w*\.?)*!"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "SECONDS", 1.0)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"rank_pattern": {"v_proj": 4, ENDLESS: 4}}, "rank_pattern"),
        ({"alpha_pattern": {r"(\w|.)" * 29 + "!": 4}}, "alpha_pattern"),
        ({"target_modules": ENDLESS}, "target_modules"),
    ],
    ids=["nested", "choices", "target_modules"],
)
def test_an_expression_without_end_is_one_problem(
    fields: dict[str, Any], where: str, adapter_folder: Make
) -> None:
    folder = change_config(adapter_folder("plain"), **fields)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="not done with the modules' names") as raised:
        load_adapter(folder)
    assert time.perf_counter() - started < 30
    (problem,) = raised.value.problems
    assert problem.where.endswith(f": {where}")


@pytest.mark.parametrize(
    "fields",
    [
        {
            "target_modules": "(?i)"
            + "".join(f"[{chr(0x3000 + i)}-\U0010ffff]" for i in range(9_000))
        },
        {"rank_pattern": {f"(?i:[{chr(0x3000 + i)}-\U0010ffff])": 4 for i in range(4_000)}},
        {"layers_pattern": ["b" * 800_000 + "|" + "b" * 800_000 + "c"]},
    ],
    ids=["sets", "many sets", "one beginning"],
)
def test_an_expression_that_is_not_compiled_in_time_is_one_problem(
    fields: dict[str, Any], adapter_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "_SECONDS_A_CHARACTER", 0.0)
    folder = change_config(adapter_folder("plain"), **fields)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="not compiled after 1 sec") as raised:
        load_adapter(folder)
    assert time.perf_counter() - started < 10
    assert len(raised.value.problems) == 1


def test_long_expressions_that_name_modules_are_taken(adapter_folder: Make) -> None:
    key = either(qualified(f"layers.{index}.experts.gate_proj") for index in range(4_000))
    assert len(key) > prompt._LONGEST
    load_adapter(change_config(adapter_folder("plain"), rank_pattern={key: 8}))


def test_a_pattern_of_layers_is_one_where_peft_puts_it(adapter_folder: Make) -> None:
    fields = {"layers_pattern": ["(?P<idx>h)"], "layers_to_transform": [0]}
    with pytest.raises(ConfigError, match=r"layers_pattern.*a regular expression"):
        load_adapter(change_config(adapter_folder("plain"), **fields))


@pytest.mark.parametrize("key", ["(?i)q_proj", "(" * 5000 + ")" * 5000, "a{99999999999999999999}"])
def test_what_python_does_not_compile_is_no_expression(key: str, adapter_folder: Make) -> None:
    folder = change_config(adapter_folder("plain"), rank_pattern={key: 4})
    with pytest.raises(ConfigError, match="rank_pattern"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("key", "module"),
    [(r".*\.[qv]_proj", "layers.0.q_proj"), (r"layers\.\d+\.(?:q|k)_proj", "layers.11.k_proj")],
)
def test_harmless_expressions_are_those_of_peft(key: str, module: str) -> None:
    names = [module, "layers.0.o_proj"]
    assert not list(prompt.slow({"rank_pattern": {key: 3}}, ["rank_pattern"], names, "config"))
    for name in names:
        expected = 3 if get_pattern_key([key], name) == key else 1
        assert scaling({"r": 1, "rank_pattern": {key: 3}}, name).rank == expected


def test_plain_expressions_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(prompt, "_tried", never)
    keys = ["q_proj", "layers.0.q_proj", r"^model\.layers\.1", qualified("experts", ["up", "down"])]
    keys.append(either(qualified(f"layers.{i}.experts", ["up", "down"]) for i in range(99)))
    config = {"rank_pattern": dict.fromkeys(keys, 4), "target_modules": "up|down"}
    assert not list(prompt.unusable(config, config, "config"))
    assert not list(prompt.slow(config, config, ["layers.0.q_proj"], "config"))
    with pytest.raises(AssertionError):
        list(prompt.slow({"rank_pattern": {r"(\w|.)" * 29: 4}}, ["rank_pattern"], ["a"], "config"))
