"""config.json of an output says what its files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_ext
from tests.host.small import family, merging

QUIET = MergeOptions(quiet=True)


def merged(tmp_path: Path, document: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    out = tmp_path / "out"
    mergekit_ext.merge(MergeConfiguration.model_validate(document), out, QUIET)
    return json.loads((out / "config.json").read_text()), out


def with_own_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2 + 1
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", ["nan", "task_arithmetic"])
def test_a_head_of_its_own_is_not_tied(method: str, tmp_path: Path) -> None:
    base, one, two = family(tmp_path, tie_word_embeddings=True)
    with_own_head(one)
    parameters = {"weight": 0.5} if method == "task_arithmetic" else {}
    config, out = merged(tmp_path, merging(base, one, two, method=method, parameters=parameters))
    stored = load_file(out / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert config["tie_word_embeddings"] is False
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])


def test_heads_that_stay_tied(tmp_path: Path) -> None:
    config, out = merged(tmp_path, merging(*family(tmp_path, tie_word_embeddings=True)))
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_the_dtype_is_that_of_the_files(tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    half = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"
    config, out = merged(tmp_path, merging(base, one, two))
    stored = {str(tensor.dtype) for tensor in load_file(out / "model.safetensors").values()}
    assert stored == {f"torch.{config['dtype']}"} == {"torch.float32"}


def test_tasks_of_a_flexmerge_say_what_they_hold(tmp_path: Path) -> None:
    base, one, two = family(tmp_path, tie_word_embeddings=True)
    with_own_head(one)
    parameters = {"target_size": 2, "granularity": "model"}
    document = merging(base, one, two, method="flexmerge", parameters=parameters, dtype="bfloat16")
    out = tmp_path / "out"
    mergekit_ext.merge(MergeConfiguration.model_validate(document), out, QUIET)
    said = {name: json.loads((out / name / "config.json").read_text()) for name in ("one", "two")}
    assert {name: c["tie_word_embeddings"] for name, c in said.items()} == {
        "one": False,
        "two": True,
    }
    assert {c["dtype"] for c in said.values()} == {"bfloat16"}
    for name in said:
        model = transformers.LlamaForCausalLM.from_pretrained(out / name)
        own = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        assert torch.equal(model.lm_head.weight, own.lm_head.weight)
