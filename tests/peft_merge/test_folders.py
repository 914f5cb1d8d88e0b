"""The folders that adapters are written to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_ext.errors import MergeError, NonFiniteError
from peft_merge.io.read import load_adapter
from peft_merge.io.write import save_adapter
from tests.peft_merge.models import cast


def test_a_failure_leaves_nothing(adapter_folder, tmp_path):
    adapter = load_adapter(adapter_folder("plain"))

    def load(module):
        update = adapter.load(module)
        return replace(update, a=update.a.half() * 1e9, b=update.b.half())

    place = tmp_path / "out"
    infos = {name: replace(i, dtype=torch.float16) for name, i in adapter.infos.items()}
    with pytest.raises(NonFiniteError):
        save_adapter(replace(adapter, infos=infos, load=load), place)
    with pytest.raises(MergeError, match="read differently"):
        config = {**adapter.config, "lora_alpha": 1}
        save_adapter(replace(adapter, config=config), place)
    assert not place.exists()
    assert not [path for path in tmp_path.iterdir() if "incomplete" in path.name]


def test_the_folder_holds_what_came_about(adapter_folder, tmp_path):
    adapter = load_adapter(adapter_folder("plain"))
    adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": "org/base-7b"})
    report = {"method": "linear", "adapters": [{"name": "a"}, {"name": "b"}]}
    save_adapter(adapter, tmp_path / "o", merge_config="merge_method: linear\n", report=report)
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_config.yml",
        "merge_report.json",
        "README.md",
    }
    assert (tmp_path / "o" / "merge_config.yml").read_text() == "merge_method: linear\n"
    assert json.loads((tmp_path / "o" / "merge_report.json").read_text()) == report
    with safe_open(tmp_path / "o" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = ModelCard.load(tmp_path / "o" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "org/base-7b",
        "base_model_relation": "adapter",
        "tags": ["peft", "lora", "merge", "mergekit-ext", "base_model:adapter:org/base-7b"],
    }
    assert "merge_method: linear" in card.text and "- a" in card.text


def test_a_base_in_a_folder_is_not_named_on_the_card(adapter_folder, tmp_path):
    adapter = load_adapter(adapter_folder("ia3"))
    adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": "/home/x/base"})
    save_adapter(adapter, tmp_path / "o")
    card = ModelCard.load(tmp_path / "o" / "README.md")
    assert "base_model" not in card.data.to_dict() and "ia3" in card.data.tags
    assert "/home/x" not in card.content


def test_the_mode_of_the_folder_is_an_ordinary_one(adapter_folder, tmp_path):
    (tmp_path / "plain").mkdir()
    save_adapter(load_adapter(adapter_folder("plain")), tmp_path / "o")
    assert (tmp_path / "o").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_back_as_it_is(dtype, adapter_folder, tmp_path):
    folder = adapter_folder("plain")
    cast(folder, dtype)
    save_adapter(load_adapter(folder), tmp_path / "o")
    one, other = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "o"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and other[key].dtype == dtype for key in one)


def test_tensors_that_share_memory_are_written(adapter_folder, tmp_path):
    adapter = load_adapter(adapter_folder("saved_embedding"))
    one = adapter.saved["lm_head.weight"]()
    saved_tensors = {name: (lambda: one) for name in adapter.saved}
    save_adapter(replace(adapter, saved=saved_tensors), tmp_path / "o")
    again = load_adapter(tmp_path / "o")
    assert all(torch.equal(load(), one) for load in again.saved.values())
