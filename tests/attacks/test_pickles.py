"""Pickles are not read unless they are asked for, and never run anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ext.errors import ConfigError
from mergekit_ext.io.headers import PICKLES_VARIABLE
from peft_merge.io.read import load_adapter as load
from tests.attacks.readers import (
    command,
    export,
    load_adapter,
    merge_adapters,
    merge_base_and_adapter,
    merge_flexmerge,
    merge_lore,
    merge_nan,
    merge_with_yaml,
    own_up,
)
from tests.attacks.weights import malicious_checkpoint, malicious_pickle
from tests.models import config, write_yaml

_MERGES = [merge_nan, merge_with_yaml, merge_lore, merge_flexmerge]
_MAKES = [malicious_pickle, malicious_checkpoint]


def _pickled(file: Path, name: str) -> None:
    torch.save(load_file(file), file.with_name(name))
    file.unlink()


@pytest.fixture(params=["0", "1"], ids=["not asked for", "asked for"])
def asked(request, monkeypatch):
    """A reader runs nothing in either case."""
    monkeypatch.setenv(PICKLES_VARIABLE, request.param)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("make", _MAKES)
@pytest.mark.parametrize("reader", _MERGES)
def test_models(reader, make, inputs, refused):
    owned = inputs.parent / "owned"
    (inputs / "tuned1" / "model.safetensors").unlink()
    (inputs / "tuned1" / "pytorch_model.bin").write_bytes(make(owned))
    refused(reader, inputs)
    assert not owned.exists()


@pytest.mark.usefixtures("asked")
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


@pytest.mark.usefixtures("asked")
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


@pytest.mark.parametrize("reader", _MERGES)
def test_a_plain_pickle_of_a_model_is_read_only_when_asked_for(
    reader, inputs, refused, tmp_path, monkeypatch
):
    _pickled(inputs / "tuned1" / "model.safetensors", "pytorch_model.bin")
    said = refused(reader, inputs)
    assert "pytorch_model.bin with a pickle" in said
    assert "--allow-pickle" in said
    monkeypatch.setenv(PICKLES_VARIABLE, "1")
    assert reader(inputs, tmp_path / "out").code == 0
    assert (tmp_path / "out").is_dir()


def test_the_flag(inputs, tmp_path):
    _pickled(inputs / "tuned1" / "model.safetensors", "pytorch_model.bin")
    text = config("nan", [inputs / "tuned0", inputs / "tuned1"])
    file = write_yaml(tmp_path / "nan.yml", text)
    assert command("mergekit-ext", "check", file).code == 2
    assert command("mergekit-ext", "check", file, "--allow-pickle").code == 0
    merge = ["mergekit-ext", "merge", file, tmp_path / "out", "--quiet"]
    assert command(*merge).code == 2
    assert command(*merge, "--allow-pickle").code == 0


def test_an_adapter_on_a_base(inputs, refused, tmp_path, monkeypatch):
    """Refused with the project's methods; mergekit's own are not the project's to restrict."""
    for index in range(2):
        _pickled(inputs / f"adapter{index}" / "adapter_model.safetensors", "adapter_model.bin")
    said = refused(merge_base_and_adapter, inputs)
    assert "adapter_model.bin with a pickle" in said
    assert PICKLES_VARIABLE in said
    models = [Path(f"{inputs / 'base'}+{inputs / f'adapter{index}'}") for index in range(2)]
    stock = write_yaml(tmp_path / "linear.yml", config("linear", models, None, {"weight": 1.0}))
    assert command("mergekit-yaml", stock, tmp_path / "stock", "--quiet").code == 0
    monkeypatch.setenv(PICKLES_VARIABLE, "1")
    assert merge_base_and_adapter(inputs, tmp_path / "out").code == 0


def test_a_plain_pickle_of_an_adapter_is_read_only_when_asked_for(inputs, refused):
    expected = load(inputs / "adapter0")
    _pickled(inputs / "adapter0" / "adapter_model.safetensors", "adapter_model.bin")
    assert "pickle" in refused(load_adapter, inputs)
    found = load(inputs / "adapter0", allow_pickle=True)
    for module in expected.infos:
        assert torch.equal(found.load(module).dense(), expected.load(module).dense())


def test_a_shard_of_a_checkpoint(inputs, refused):
    owned = inputs.parent / "owned"
    for file in (inputs / "flex" / "shards").iterdir():
        file.write_bytes(malicious_checkpoint(owned))
        own_up(inputs, file)
    refused(export, inputs)
    assert not owned.exists()


@pytest.mark.parametrize("reader", [load_adapter, merge_nan])
def test_a_pickle_under_the_name_of_a_safe_file(reader, inputs, refused):
    owned = inputs.parent / "owned"
    for file in ("adapter0/adapter_model.safetensors", "tuned0/model.safetensors"):
        (inputs / file).write_bytes(malicious_checkpoint(owned))
    refused(reader, inputs)
    assert not owned.exists()
