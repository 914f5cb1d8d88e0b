"""What messages say of values, commands and functions that are slightly wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import mergekit_ext
from mergekit_ext.cli import main
from mergekit_ext.errors import ConfigError
from mergekit_ext.search import function_named

MERGE = {"merge_method": "linear", "models": [{"model": "./a"}], "parameters": {"weight": 1.0}}


@pytest.mark.parametrize(
    ("changes", "where", "found"),
    [
        ({"parameters": {"weight": math.nan}}, "parameters.weight", "expected a finite number"),
        ({"parameters": {"weight": {"from": 0, "to": 1}}}, "parameters.weight", "command `tune`"),
        ({"parameters": {"weight": {"choose": [0, 1]}}}, "parameters.weight", "command `tune`"),
        ({"merge_method": ["ties", "lore"]}, "merge_method", "command `tune`"),
        ({"dtype": "float8"}, "dtype", "Take it out"),
        ({"models": []}, "models, slices, modules", "or an empty one"),
        ({"tokenizer_source": "unoin"}, "tokenizer_source", "Write `union`"),
        ({"tokenizer": {"source": "unoin"}}, "tokenizer.source", "Write `union`"),
    ],
)
def test_problems(
    changes: dict[str, Any], where: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problems = mergekit_ext.check({**MERGE, **changes}).problems
    assert [str(p) for p in problems if p.where == where and found in str(p)], problems


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_remedies_of_merge_models_are_arguments(method: str) -> None:
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    with pytest.raises(ConfigError) as raised:
        mergekit_ext.merge_models(models, method)
    text = str(raised.value)
    assert "Give `weight=`." in text and ":`" not in text
    assert ("Give `base`" in text) == (method == "ties")


def test_commands_and_functions() -> None:
    assert "Write `decompose`" in CliRunner().invoke(main, ["decompos"]).output
    assert "No such command" in CliRunner().invoke(main, ["zz"]).output
    with pytest.raises(ConfigError, match=r"1 problem with this command(?s:.)*found math alone"):
        function_named("math", "--evaluate", "a model")
