"""Writing adapters so that PEFT loads them as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors import safe_open

from mergekit_ext.errors import ConfigError, MergeError, NonFiniteError
from peft_merge.adapter import Ia3Adapter, LoraAdapter, Update
from peft_merge.io import load_adapter, merged_ia3, merged_lora, save_adapter
from tests.peft_merge.models import KINDS, Kind, answer, reloaded, saved

ALL = list(KINDS.values())


def _same_answers(kind: Kind, one: Path, other: Path) -> None:
    expected = answer(kind, reloaded(kind, one))
    torch.testing.assert_close(answer(kind, reloaded(kind, other)), expected, rtol=1e-4, atol=1e-4)


def _again(name: str, folder: Path) -> LoraAdapter | Ia3Adapter:
    """One adapter as a merge of itself would be built."""
    adapter = load_adapter(folder)
    whole = {key: load() for key, load in adapter.saved.items()}
    if isinstance(adapter, LoraAdapter):
        updates = {module: adapter.load(module) for module in adapter.infos}
        return merged_lora(name, updates, adapter.infos, [adapter], whole)
    vectors = {module: adapter.load(module) for module in adapter.infos}
    return merged_ia3(name, vectors, adapter.infos, [adapter], whole)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_an_adapter_that_is_read_and_written_is_the_same_function(
    kind: Kind, tmp_path: Path
) -> None:
    folder = saved(kind, tmp_path / "one", seed=1)
    save_adapter(load_adapter(folder), tmp_path / "two")
    _same_answers(kind, folder, tmp_path / "two")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_a_merged_adapter_of_one_is_the_same_function(kind: Kind, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "one", seed=1)
    save_adapter(_again("again", folder), tmp_path / "two")
    _same_answers(kind, folder, tmp_path / "two")
    config = PeftConfig.from_pretrained(str(tmp_path / "two"))
    assert config.inference_mode
    if kind.lora:
        assert config.lora_alpha == config.r
        assert config.alpha_pattern == config.rank_pattern
        assert not config.use_rslora
