"""Adapters of a PeftModel in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from mergekit_ext.errors import ConfigError
from peft_merge.adapter import LoraAdapter
from peft_merge.io import adapters_of, load_adapter, save_adapter
from tests.peft_merge.models import KINDS, Kind, adapted, add, answer, reloaded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=lambda kind: kind.name)
def test_they_are_what_saving_and_reading_gives(kind: Kind, tmp_path: Path) -> None:
    model = adapted(kind, seed=1)
    (live,) = adapters_of(model, ["default"])
    model.save_pretrained(tmp_path)
    read = load_adapter(tmp_path)
    assert live.name == "default" and type(live) is type(read)
    assert dict(live.infos) == dict(read.infos)
    for module in live.infos:
        one, other = live.load(module), read.load(module)
        if isinstance(live, LoraAdapter):
            assert one.scale == other.scale
            assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
            assert not one.a.requires_grad
        else:
            assert torch.equal(one, other)
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    if live.config.get("modules_to_save"):
        embeddings = set()
    assert set(live.saved) == set(read.saved) - embeddings
    for name, tensor in live.saved.items():
        assert torch.equal(tensor(), read.saved[name]())


def test_several_adapters_of_one_model() -> None:
    kind = KINDS["plain"]
    model = adapted(kind, seed=1)
    add(model, "second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), seed=2)
    first, second = adapters_of(model, ["default", "second"])
    assert (first.name, second.name) == ("default", "second")
    assert {name.rpartition(".")[2] for name in first.infos} == {"q_proj", "v_proj"}
    assert {name.rpartition(".")[2] for name in second.infos} == {"q_proj", "o_proj"}
    assert {info.rank for info in second.infos.values()} == {2}


def test_heads_of_two_adapters_are_told_apart() -> None:
    kind = KINDS["modules_to_save"]
    model = adapted(kind, seed=1)
    add(model, "second", kind.config(), seed=2)
    first, second = adapters_of(model, ["default", "second"])
    assert set(first.saved) == set(second.saved) == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(first.saved["classifier.weight"](), second.saved["classifier.weight"]())


def test_nested_parameters_of_two_adapters() -> None:
    kind = KINDS["nested_parameters"]
    model = adapted(kind, seed=1)
    add(model, "second", kind.config(), seed=2)
    for adapter in adapters_of(model, ["default", "second"]):
        for module in adapter.infos:
            layer = model.base_model.model.get_submodule(module)
            change = adapter.load(module).dense()
            expected = layer.get_delta_weight(adapter.name).double()
            torch.testing.assert_close(change.squeeze(0), expected, rtol=1e-4, atol=1e-5)


def test_a_live_adapter_can_be_written(tmp_path: Path) -> None:
    kind = KINDS["patterns"]
    model = adapted(kind, seed=1)
    (live,) = adapters_of(model, ["default"])
    save_adapter(live, tmp_path / "out")
    again = answer(kind, reloaded(kind, tmp_path / "out"))
    torch.testing.assert_close(again, answer(kind, model), rtol=1e-5, atol=1e-5)


def test_unknown_names_and_refused_kinds_come_together() -> None:
    model = adapted(KINDS["plain"], seed=1)
    add(model, "dora", LoraConfig(target_modules=["q_proj"], use_dora=True), seed=2)
    with pytest.raises(ConfigError) as raised:
        adapters_of(model, ["default", "dora", "absent"])
    assert len(raised.value.problems) == 2
    assert "DoRA" in str(raised.value) and "absent" in str(raised.value)


def test_reading_a_model_leaves_it_as_it_is() -> None:
    kind = KINDS["embedding"]
    model = adapted(kind, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.peft_config["default"].to_dict())
    (live,) = adapters_of(model, ["default"])
    for module in live.infos:
        live.load(module)
    assert model.peft_config["default"].to_dict() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
