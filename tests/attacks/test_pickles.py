"""Pickles are not read where nobody asked for them, and run nothing where somebody did."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ext.errors import ConfigError
from peft_merge.io import load_adapter as load
from tests.attacks.readers import (
    load_adapter,
    merge_adapters,
    merge_base_and_adapter,
    merge_flexmerge,
    merge_lore,
    merge_nan,
    merge_with_yaml,
)
from tests.attacks.weights import malicious_checkpoint, malicious_pickle

_MERGES = [merge_nan, merge_with_yaml, merge_lore, merge_flexmerge]
_MAKES = [malicious_pickle, malicious_checkpoint]


@pytest.mark.parametrize("make", _MAKES)
@pytest.mark.parametrize("reader", _MERGES)
def test_models(reader, make, inputs, refused):
    owned = inputs.parent / "owned"
    (inputs / "tuned1" / "model.safetensors").unlink()
    (inputs / "tuned1" / "pytorch_model.bin").write_bytes(make(owned))
    refused(reader, inputs)
    assert not owned.exists()


@pytest.mark.parametrize("make", _MAKES)
def test_shards_that_an_index_names(make, inputs, refused):
    owned = inputs.parent / "owned"
    folder = inputs / "tuned1"
    (folder / "model.safetensors").unlink()
    (folder / "weights.bin").write_bytes(make(owned))
    index = {"metadata": {}, "weight_map": {"weight": "weights.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(merge_nan, inputs)
    (folder / "pytorch_model.bin.index.json").rename(folder / "model.safetensors.index.json")
    refused(merge_nan, inputs)
    assert not owned.exists()


@pytest.mark.parametrize("make", _MAKES)
@pytest.mark.parametrize("reader", [load_adapter, merge_adapters, merge_base_and_adapter])
def test_adapters(reader, make, inputs, refused):
    owned = inputs.parent / "owned"
    for folder in (inputs / "adapter0", inputs / "adapter1"):
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(make(owned))
    refused(reader, inputs)
    with pytest.raises(ConfigError):
        load(inputs / "adapter0", allow_pickle=True)
    assert not owned.exists()


def test_a_plain_pickle_is_read_only_when_asked_for(inputs, refused):
    file = inputs / "adapter0" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.unlink()
    assert "pickle" in refused(load_adapter, inputs)
    assert load(inputs / "adapter0", allow_pickle=True).infos


@pytest.mark.parametrize("reader", [load_adapter, merge_nan])
def test_a_pickle_under_the_name_of_a_safe_file(reader, inputs, refused):
    owned = inputs.parent / "owned"
    for file in ("adapter0/adapter_model.safetensors", "tuned0/model.safetensors"):
        (inputs / file).write_bytes(malicious_checkpoint(owned))
    refused(reader, inputs)
    assert not owned.exists()
