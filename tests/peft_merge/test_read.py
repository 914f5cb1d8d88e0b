"""Reading adapters that PEFT wrote: every kind, and every bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ext.errors import ConfigError, NonFiniteError
from peft_merge.adapter import Ia3Adapter, LoraAdapter, ModuleInfo
from peft_merge.io import load_adapter, load_adapters
from tests.peft_merge.models import KINDS, Kind, adapted, cast, reloaded, saved

LORAS = [kind for kind in KINDS.values() if kind.lora]
VECTORS = [kind for kind in KINDS.values() if not kind.lora]


def _layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's own layers by the names that the adapter's modules have."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and module.r
    }


def _as_weight(change: Tensor, info: ModuleInfo, layer: Any) -> Tensor:
    """A change in the coordinates of A and B as PEFT adds it to the weight."""
    if info.layout == "convolution":
        inputs = info.columns // torch.Size(info.kernel).numel()
        return change.reshape(info.matrices * info.rows, inputs, *info.kernel)
    if info.layout == "embedding":
        return change[0].T
    if info.layout == "parameter" and info.matrices > 1:
        return change if layer._did_swap_in_out_features else change.mT
    return change[0].T if getattr(layer, "fan_in_fan_out", False) else change[0]


@pytest.mark.parametrize("kind", LORAS, ids=lambda kind: kind.name)
def test_every_change_is_the_one_that_peft_adds(kind: Kind, tmp_path: Path) -> None:
    adapter = load_adapter(saved(kind, tmp_path / "one", seed=1))
    assert isinstance(adapter, LoraAdapter)
    layers = _layers(reloaded(kind, tmp_path / "one"))
    assert set(adapter.infos) == set(layers)
    for name, info in adapter.infos.items():
        layer, update = layers[name], adapter.load(name)
        assert update.a.shape == (info.matrices, info.rank, info.columns)
        assert update.b.shape == (info.matrices, info.rows, info.rank)
        if info.matrices > 1 and info.layout == "convolution":
            continue  # PEFT cannot compute it; `test_layouts` compares outputs
        expected = layer.get_delta_weight("default").to(torch.float64)
        change = _as_weight(update.dense(), info, layer)
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert (update.bias is not None) == info.bias
        if update.bias is not None:
            torch.testing.assert_close(update.bias, layer.lora_B["default"].bias.detach())


@pytest.mark.parametrize("kind", VECTORS, ids=lambda kind: kind.name)
def test_every_vector_is_the_one_that_peft_multiplies_by(kind: Kind, tmp_path: Path) -> None:
    adapter = load_adapter(saved(kind, tmp_path / "one", seed=1))
    assert isinstance(adapter, Ia3Adapter)
    model = adapted(kind, seed=1)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "ia3_l")
    }
    assert set(adapter.infos) == set(layers)
    for name, info in adapter.infos.items():
        assert info.feedforward == layers[name].is_feedforward
        assert info.shape == tuple(layers[name].ia3_l["default"].shape)
        assert torch.equal(adapter.load(name), layers[name].ia3_l["default"].detach())
