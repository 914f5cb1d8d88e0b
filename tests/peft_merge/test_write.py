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
from peft_merge.io import compatible, load_adapter, merged_ia3, merged_lora, save_adapter
from tests.peft_merge.models import KINDS, Kind, answer, reloaded, saved

ALL = list(KINDS.values())


def _same_answers(kind: Kind, one: Path, other: Path) -> None:
    expected = answer(kind, reloaded(kind, one))
    torch.testing.assert_close(answer(kind, reloaded(kind, other)), expected, rtol=1e-4, atol=1e-4)


def _turned(update: Update) -> Update:
    """The same change in other factors, as a merge gives it."""
    generator = torch.Generator().manual_seed(update.a.numel())
    r = update.a.shape[1]
    mix = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
    a, b = mix @ update.a.double(), update.b.double() @ mix.T
    return replace(update, a=a.to(update.a.dtype), b=b.to(update.b.dtype))


def _again(name: str, folder: Path) -> LoraAdapter | Ia3Adapter:
    """One adapter as a merge of itself would be built."""
    adapter = load_adapter(folder)
    whole = {key: load() for key, load in adapter.saved.items()}
    if isinstance(adapter, LoraAdapter):
        updates = {module: _turned(adapter.load(module)) for module in adapter.infos}
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


def _sum(adapters: list[LoraAdapter], name: str = "sum") -> LoraAdapter:
    """The exact sum: factors side by side."""
    infos = {module: info for adapter in adapters for module, info in adapter.infos.items()}
    updates = {}
    for module, info in infos.items():
        parts = [adapter.load(module) for adapter in adapters if module in adapter.infos]
        biases = [part.scale * part.bias for part in parts if part.bias is not None]
        updates[module] = Update(
            torch.cat([part.a for part in parts], dim=1),
            torch.cat([part.scale * part.b for part in parts], dim=2),
            1.0,
            sum(biases[1:], biases[0]) if biases else None,
        )
        assert updates[module].a.shape[2] == info.columns
    whole = {key: load() for adapter in adapters for key, load in adapter.saved.items()}
    return merged_lora(name, updates, infos, adapters, whole)


def _dense(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if getattr(module, "r", None) and hasattr(module, "get_delta_weight")
    }


GROUPS = [
    ("plain", "patterns", "rslora_patterns", "regex"),
    ("plain", "plain"),
    ("one_layer", "excluded", "embedding"),
    ("lora_bias", "bias_lora_only", "modules_to_save"),
    ("parameters", "parameters"),
    ("nested_parameters", "nested_parameters"),
    ("attention", "attention"),
    ("replicated", "replicated"),
]


@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_the_sum_of_unlike_adapters_has_the_sum_of_their_changes(
    group: tuple[str, ...], tmp_path: Path
) -> None:
    folders = [saved(KINDS[name], tmp_path / f"{i}", seed=i) for i, name in enumerate(group)]
    adapters = [load_adapter(folder) for folder in folders]
    assert compatible(adapters) == []
    save_adapter(_sum([a for a in adapters if isinstance(a, LoraAdapter)]), tmp_path / "sum")
    expected: dict[str, torch.Tensor] = {}
    for name, folder in zip(group, folders, strict=True):
        for module, change in _dense(reloaded(KINDS[name], folder)).items():
            expected[module] = expected.get(module, 0) + change
    found = _dense(reloaded(KINDS[group[0]], tmp_path / "sum"))
    assert set(found) == set(expected)
    for module, change in expected.items():
        torch.testing.assert_close(found[module], change, rtol=1e-4, atol=1e-4, msg=module)
