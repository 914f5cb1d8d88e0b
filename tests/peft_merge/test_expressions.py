"""Expressions of a configuration mean what PEFT means; what is none is a problem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft.utils.other import get_pattern_key

from mergekit_ext.errors import ConfigError
from peft_merge.io import load_adapter
from peft_merge.io.targets import either, qualified, scaling
from tests.peft_merge.edit import change_config

Make = Callable[..., Path]


def test_long_expressions_that_name_modules_are_taken(adapter_folder: Make) -> None:
    key = either(qualified(f"layers.{index}.experts.gate_proj") for index in range(4_000))
    load_adapter(change_config(adapter_folder("plain"), rank_pattern={key: 8}))


def test_longer_ones_are_refused(adapter_folder: Make) -> None:
    folder = change_config(adapter_folder("plain"), target_modules="a|" * 600_000 + "q_proj")
    with pytest.raises(ConfigError, match="1,200,006 characters"):
        load_adapter(folder)


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
def test_expressions_are_those_of_peft(key: str, module: str) -> None:
    for name in (module, "layers.0.o_proj"):
        expected = 3 if get_pattern_key([key], name) == key else 1
        assert scaling({"r": 1, "rank_pattern": {key: 3}}, name).rank == expected
