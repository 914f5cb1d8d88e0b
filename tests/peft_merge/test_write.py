"""Writing adapters so that PEFT loads them as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from peft_merge.adapter import Ia3Adapter, VectorInfo
from peft_merge.io.merged import merged_adapter
from peft_merge.io.read import load_adapter
from peft_merge.io.write import save_adapter
from peft_merge.merge import merge_adapters
from tests.peft_merge.models import KINDS, Kind, answer, numbers, reloaded, saved


def _same_answers(kind, one, other):
    expected = answer(kind, reloaded(kind, one))
    torch.testing.assert_close(answer(kind, reloaded(kind, other)), expected, rtol=1e-4, atol=1e-4)


def _sum(adapters, patterns=False):
    one_sum = {"normalize": False}
    whole = "average"
    found = merge_adapters(adapters, parameters=one_sum, patterns=patterns, modules_to_save=whole)
    return found.adapter


def _dense(model):
    return {
        name: module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if getattr(module, "r", None) and hasattr(module, "get_delta_weight")
    }


pytestmark = pytest.mark.filterwarnings("ignore:.* share . of the .* modules")
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


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_the_sum_of_unlike_adapters_has_the_sum_of_their_changes(group, patterns, tmp_path):
    folders = [saved(KINDS[name], tmp_path / f"{i}", seed=i) for i, name in enumerate(group)]
    save_adapter(_sum(folders, patterns=patterns), tmp_path / "sum")
    expected: dict[str, torch.Tensor] = {}
    for name, folder in zip(group, folders, strict=True):
        for module, change in _dense(reloaded(KINDS[name], folder)).items():
            expected[module] = expected.get(module, 0) + change
    found = _dense(reloaded(KINDS[group[0]], tmp_path / "sum"))
    assert set(found) == set(expected)
    for module, change in expected.items():
        torch.testing.assert_close(found[module], change, rtol=1e-4, atol=1e-4, msg=module)


def test_ranks_differ_where_they_must_and_only_there(adapter_folder):
    one, two = (adapter_folder("plain", seed) for seed in (1, 2))
    other = adapter_folder("regex", 3)
    config = _sum([one, other], patterns=True).config
    assert config["r"] == config["lora_alpha"] == 4 and not config["rank_pattern"]
    assert len(config["target_modules"]) == 6
    config = _sum([one, two, other]).config
    assert config["r"] == config["lora_alpha"] == 8 and not config["rank_pattern"]
    config = _sum([one, two, other], patterns=True).config
    assert config["r"] == 8
    assert config["rank_pattern"] == {
        r"^(?:model\.layers\.1\.mlp\.down_proj|model\.layers\.1\.mlp\.up_proj)": 4
    }


@pytest.mark.parametrize("kind", ["regex", "excluded", "one_layer", "ia3"])
def test_the_inputs_own_target_modules_are_kept_where_they_say_the_same(kind, adapter_folder):
    folders = [adapter_folder(kind, seed) for seed in (1, 2)]
    merged = merge_adapters(folders).adapter
    assert merged.config["target_modules"] == load_adapter(folders[0]).config["target_modules"]


def test_a_card_and_a_report_may_be_of_any_kind(adapter_folder, tmp_path):
    adapter = load_adapter(adapter_folder("plain"))
    for number, report in enumerate(({"method": "x", "adapters": ["p", "q"]}, {"adapters": None})):
        save_adapter(adapter, tmp_path / f"{number}", report=report)
    assert "- p\n- q\n" in (tmp_path / "0" / "README.md").read_text()
    save_adapter(adapter, tmp_path / "own", card="# Mine")
    assert (tmp_path / "own" / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("kind", [np.float32, np.int64, torch.tensor])
def test_settings_may_be_numbers_of_numpy_and_torch(kind, adapter_folder, tmp_path):
    merged = merge_adapters(
        [adapter_folder("plain")], "dare_linear", weights=[kind(2)], parameters={"density": kind(1)}
    )
    merged.save(tmp_path / "merged")
    assert "weight: 2" in (tmp_path / "merged" / "merge_config.yml").read_text()


def test_a_scale_goes_into_the_factors(adapter_folder):
    adapter = load_adapter(adapter_folder("lora_bias"))
    for scale in (1.5, -0.7, 0.0, 1e-12):
        updates = {name: replace(adapter.load(name), scale=scale) for name in adapter.infos}
        merged = merged_adapter("x", updates, adapter.infos, [adapter])
        for name, update in updates.items():
            found = merged.load(name)
            assert found.scale == 1 and found.bias is not None and update.bias is not None
            torch.testing.assert_close(
                found.dense(), update.dense(), rtol=1e-5, atol=1e-5 * abs(scale)
            )
            torch.testing.assert_close(found.bias, scale * update.bias)


def test_a_change_of_rank_zero_is_stored_as_zeros(adapter_folder, tmp_path):
    adapter = load_adapter(adapter_folder("plain"))
    updates = {}
    for name in adapter.infos:
        update = adapter.load(name)
        updates[name] = replace(update, a=update.a[:, :0], b=update.b[:, :, :0])
    save_adapter(merged_adapter("zero", updates, adapter.infos, [adapter]), tmp_path / "zero")
    model = reloaded(KINDS["plain"], tmp_path / "zero")
    with model.disable_adapter():
        expected = answer(KINDS["plain"], model)
    assert torch.equal(answer(KINDS["plain"], model), expected)


def test_projections_of_one_attention_get_one_rank(adapter_folder, tmp_path):
    kind = KINDS["attention"]
    folder = adapter_folder("attention")
    adapter = load_adapter(folder)
    updates = {name: adapter.load(name) for name in adapter.infos}
    wide = updates["attention"]
    updates["attention"] = replace(
        wide, a=torch.cat([wide.a, wide.a], 1), b=torch.cat([wide.b, wide.b], 2) / 2
    )
    wider = merged_adapter("wide", updates, adapter.infos, [adapter], patterns=True)
    save_adapter(wider, tmp_path / "wide")
    _same_answers(kind, folder, tmp_path / "wide")
    assert PeftConfig.from_pretrained(str(tmp_path / "wide")).rank_pattern == {"^head": 4}


def test_a_dropped_head_is_not_expected_either(adapter_folder, tmp_path):
    # PEFT adds "classifier" to modules_to_save for SEQ_CLS, and then needs its tensors.
    for kind in ("modules_to_save", "ia3_modules_to_save"):
        adapter = replace(load_adapter(adapter_folder(kind)), name=kind)
        infos, load = adapter.infos, adapter.load
        values = {name: load(name) for name in infos}
        save_adapter(merged_adapter(kind, values, infos, [adapter]), tmp_path / kind)
        assert torch.isfinite(answer(KINDS[kind], reloaded(KINDS[kind], tmp_path / kind))).all()


def test_a_feedforward_name_that_ends_another_name_is_not_taken_for_it(tmp_path):
    infos = {
        "proj": VectorInfo((1, 6), True),
        "deep.proj": VectorInfo((6, 1), False),
    }
    vectors = {name: torch.full(info.shape, 2.0) for name, info in infos.items()}
    config = {"peft_type": "IA3", "target_modules": ["proj"], "feedforward_modules": []}
    source = Ia3Adapter("a", config, infos, vectors.__getitem__)
    other = replace(source, name="b", config={**config, "target_modules": ["x"]})
    save_adapter(merged_adapter("m", vectors, infos, [source, other]), tmp_path / "m")
    model = reloaded(KINDS["named"], tmp_path / "m")
    layers = model.base_model.model
    assert layers.proj.is_feedforward and not layers.deep["proj"].is_feedforward
    assert torch.equal(layers.deep["proj"].ia3_l["default"].detach(), vectors["deep.proj"])


class _Layers(nn.Module):
    """A model whose own names start like PEFT's wrapper, `base_layer`."""

    def __init__(self):
        super().__init__()
        layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.encoder = nn.ModuleDict({"base_layers": layers})

    def forward(self, x):
        first, second = self.encoder["base_layers"]
        return second(torch.tanh(first(x)))


def test_names_that_start_like_peft_s_wrapper(tmp_path):
    def config(*target):
        return LoraConfig(r=2, target_modules=[f"base_layers.{index}" for index in target])

    kind = Kind("layers", _Layers, lambda: config("0", "1"), numbers(2, 6))
    folder = saved(kind, tmp_path / "one", seed=1)
    other = saved(replace(kind, config=lambda: config("0")), tmp_path / "two", seed=2)
    merge_adapters([folder, other], weights=[1, 0]).save(tmp_path / "merged")
    _same_answers(kind, folder, tmp_path / "merged")
