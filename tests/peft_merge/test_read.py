"""Reading adapters that PEFT wrote, of every kind."""

from __future__ import annotations

import pytest
import torch

from peft_merge.io.read import load_adapter
from tests.peft_merge.edit import Q, change_tensors
from tests.peft_merge.models import KINDS, adapted, cast, reloaded, saved

LORAS = [kind for kind in KINDS.values() if kind.lora]
VECTORS = [kind for kind in KINDS.values() if not kind.lora]


def _layers(model):
    """PEFT's own layers by the names that the adapter's modules have."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and module.r
    }


def _as_weight(change, info, layer):
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
def test_every_change_is_the_one_that_peft_adds(kind, tmp_path):
    adapter = load_adapter(saved(kind, tmp_path / "one", seed=1))
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
def test_every_vector_is_the_one_that_peft_multiplies_by(kind, tmp_path):
    adapter = load_adapter(saved(kind, tmp_path / "one", seed=1))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype, adapter_folder):
    folder = adapter_folder("plain")
    cast(folder, dtype)
    adapter = load_adapter(folder)
    for module, info in adapter.infos.items():
        update = adapter.load(module)
        assert info.dtype == update.a.dtype == update.b.dtype == dtype


def test_factors_of_two_dtypes_are_read_in_the_wider(adapter_folder):
    def change(tensors):
        tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"].bfloat16()

    adapter = load_adapter(change_tensors(adapter_folder("plain"), change))
    update = adapter.load("model.layers.0.self_attn.q_proj")
    assert update.a.dtype == update.b.dtype == torch.float32


def test_whole_tensors_have_the_names_of_the_base(adapter_folder):
    saved_names = set(load_adapter(adapter_folder("bias_all")).saved)
    assert "bert.encoder.layer.0.attention.self.query.bias" in saved_names
    assert "classifier.weight" in saved_names
    assert not any("base_layer" in n or "original" in n or "modules_to" in n for n in saved_names)
    assert set(load_adapter(adapter_folder("embedding")).saved) == {"model.embed_tokens.weight"}


def test_a_resized_embedding_is_a_whole_tensor(adapter_folder):
    key = "model.embed_tokens.weight"
    folder = change_tensors(
        adapter_folder("plain"), lambda t: t.update({f"base_model.model.{key}": torch.ones(40, 16)})
    )
    adapter = load_adapter(folder)
    assert set(adapter.saved) == {key}
    assert torch.equal(adapter.saved[key](), torch.ones(40, 16))
