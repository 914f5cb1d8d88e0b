"""Inputs and output hold what their transformers classes expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_ext
from mergekit_ext.io.class_model import loading
from tests.attacks.readers import command
from tests.host.small import SMALL, bert, checked, family, llama, merging
from tests.models import state, write_yaml

QUIET = MergeOptions(quiet=True)


@pytest.mark.parametrize("change", ["missing", "ignored", "misshapen"])
def test_the_loader_says_what_from_pretrained_says(change: str, tmp_path: Path) -> None:
    kind, model = transformers.LlamaForCausalLM, llama()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if change == "missing":
        del state["model.layers.1.mlp.up_proj.weight"]
    elif change == "ignored":
        state["model.layers.1.mlp.extra.weight"] = torch.ones(2)
    else:
        state["model.norm.weight"] = torch.ones(0)
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = kind.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    found = loading(config, {name: list(tensor.shape) for name, tensor in state.items()})
    assert found is not None and not found.error
    assert set(found.missing) == info["missing_keys"]
    assert set(found.ignored) == info["unexpected_keys"]
    assert len(found.misshapen) == len(info["mismatched_keys"])
    assert [len(part) for part in (found.missing, found.ignored, found.misshapen)].count(1) == 1


def test_old_names_of_a_vision_model_load(models: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(models / "vit_a")
    stored = load_file(models / "vit_a" / "model.safetensors")
    assert any(name.startswith("vit.encoder.layer.0") for name in stored)
    found = loading(config, {name: list(tensor.shape) for name, tensor in stored.items()})
    assert found is not None and not (found.missing or found.misshapen or found.ignored)


def test_a_class_from_elsewhere_is_not_known() -> None:
    config = transformers.LlamaConfig(**SMALL, architectures=["MyOwnModel"])
    assert loading(config, {"a": [1]}) is None


@pytest.mark.parametrize("flags", [{"attention_bias": True}, {"mlp_bias": True}])
def test_tensors_that_mergekits_table_leaves_out_are_merged(
    flags: dict[str, bool], tmp_path: Path
) -> None:
    base, one, two = family(tmp_path, **flags)
    document = merging(base, one, two)
    mergekit_ext.merge(MergeConfiguration.model_validate(document), tmp_path / "out", QUIET)
    found, start = state(tmp_path / "out"), state(base)
    biases = [name for name in start if name.endswith(".bias")]
    assert biases and not any(found[name].equal(start[name]) for name in biases)
    _, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())


def test_a_model_that_lacks_a_tensor_of_its_class_is_named_once(tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    state = load_file(one / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, one / "model.safetensors", {"format": "pt"})
    (problem,) = checked(merging(base, one, two)).problems
    assert problem.where == "models[0].model" and "model.norm.weight missing" in problem.found


def test_a_stored_tensor_that_no_class_reads_is_a_note(tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    state = {**load_file(one / "model.safetensors"), "model.extra": torch.ones(2)}
    save_file(state, one / "model.safetensors", {"format": "pt"})
    report = checked(merging(base, one, two))
    assert not report.problems
    assert any("does not have model.extra" in note for note in report.notes)


def test_a_stock_method_keeps_every_tensor_by_its_own_command_and_by_ours(tmp_path: Path) -> None:
    base, one, two = family(tmp_path, attention_bias=True)
    document = merging(base, one, two, method="task_arithmetic", parameters={"weight": 1.0})
    config = write_yaml(tmp_path / "m.yml", document)
    places = {"mergekit-yaml": tmp_path / "stock", "mergekit-ext merge": tmp_path / "ours"}
    for name, out in places.items():
        done = command(*name.split(), config, out)
        assert done.code == 0 and "Warning: the output" not in done.text
    stock, ours = map(state, places.values())
    assert stock.keys() == ours.keys() == state(base).keys()
    assert all(tensor.equal(ours[name]) for name, tensor in stock.items())


def test_bodies_without_a_pooler_are_merged_with_a_warning(tmp_path: Path) -> None:
    config = bert()
    folders = [tmp_path / name for name in ("base", "one", "two")]
    for folder in folders:
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    document = merging(*folders, method="flexmerge", parameters={"target_size": 1})
    report = checked(document)
    assert not report.problems
    (warning,) = report.warnings
    assert "pooler.dense.bias" in warning and "which no model has" in warning
    transformers.BertModel(config).save_pretrained(folders[2])
    problems = checked(document).problems
    assert [p.where for p in problems] == ["models[0].model", "base_model"]
