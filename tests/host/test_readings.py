"""Inputs are read as transformers reads them, or refused; stored codes are no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_ext
from mergekit_ext.errors import Problem
from mergekit_ext.io.quantised import stored_codes
from tests.host.small import checked, family, llama, merging, tuned

FLEX = {"method": "flexmerge", "parameters": {"target_size": 2}}


def only(base: Path, *models: Path, **rest) -> Problem:
    (problem,) = checked(merging(base, *models, **rest)).problems
    return problem


@pytest.mark.parametrize("method", [{}, FLEX])
def test_a_stale_single_file_beside_shards(method: dict, tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    tuned(llama(), 5).save_pretrained(one, max_shard_size="2KB")
    assert (one / "model.safetensors").exists() and (one / "model.safetensors.index.json").exists()
    problem = only(base, one, two, **method)
    assert "transformers loads" in problem.found and "mergekit reads" in problem.found
    (one / "model.safetensors").unlink()
    assert not checked(merging(base, one, two, **method)).problems


def test_an_index_that_names_the_single_file_is_one_reading(tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    names = load_file(one / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not checked(merging(base, one, two)).problems


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    tensors = load_file(one / "model.safetensors")
    (one / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file(tensors, one / shard, {"format": "pt"})
    listed = dict.fromkeys(list(tensors)[1:], shard)
    index = {"metadata": {}, "weight_map": listed}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    problem = only(base, one, two)
    assert next(iter(tensors)) in problem.found and "transformers would load other" in problem.found


def test_an_adapter_inside_of_a_models_folder(tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4}
    (one / "adapter_config.json").write_text(json.dumps(content))
    problem = only(base, one, two)
    assert "adapter_config.json" in problem.found and f"{one}+{one}" in problem.remedy


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("transformers_weights", "other.safetensors", "other.safetensors"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
    ],
)
def test_fields_of_another_reading(field: str, value: object, said: str, tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    content = {**json.loads((one / "config.json").read_text()), field: value}
    (one / "config.json").write_text(json.dumps(content))
    shutil.copyfile(two / "model.safetensors", one / "other.safetensors")
    problem = only(base, one, two)
    assert problem.where == f"models[0].model (config.json: {field})" and said in problem.found


# Codes


CODES = {
    "fine-grained fp8": {"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32"},
    "compressed-tensors": {"a.weight": "I8", "a.weight_scale": "F32"},
    "compressed-tensors, packed": {"a.weight_packed": "I32", "a.weight_scale": "F32"},
    "bitsandbytes, 4 bits": {"a.weight": "U8", "a.weight.quant_state.bitsandbytes__nf4": "U8"},
    "bitsandbytes, 8 bits": {"a.weight": "I8", "a.SCB": "F32"},
    "GPTQ": {"a.qweight": "I32", "a.scales": "F16", "a.qzeros": "I32"},
    "HQQ": {"a.W_q": "U8", "a.scale": "F16"},
    "MXFP4": {"a.gate_up_proj_blocks": "U8", "a.gate_up_proj_scales": "U8"},
    "torchao": {"a.weight:qdata": "F8_E4M3", "a.weight:scale": "F32"},
    "quanto": {"a.weight._data": "I8", "a.weight._scale": "F32"},
}


@pytest.mark.parametrize("names", CODES.values(), ids=CODES.keys())
def test_codes_of_each_format_are_found(names: dict[str, str]) -> None:
    assert stored_codes(names)


@pytest.mark.parametrize(
    "kind",
    ["CLIPModel", "SwinModel", "BeitModel", "Gemma3ForCausalLM", "MixtralForCausalLM"],
)
def test_no_model_has_codes_by_its_names(kind: str) -> None:
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        names = list(cls(cls.config_class()).state_dict())
    assert not stored_codes(names)


@pytest.mark.parametrize("method", [{}, FLEX, {"method": "task_arithmetic"}])
def test_scales_beside_weights_are_refused(method: dict, tmp_path: Path) -> None:
    base, one, two = family(tmp_path)
    state = load_file(two / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = state[name].abs().amax(1, keepdim=True) / 127
    state[name] = (state[name] / scale).round().to(torch.int8)
    state[f"{name}_scale"] = scale
    save_file(state, two / "model.safetensors", {"format": "pt"})
    document = merging(base, one, two, **method)
    found = [p for p in checked(document).problems if p.where.startswith("models[1].model")]
    assert f"{name}_scale" in " ".join(problem.found for problem in found)
    with pytest.raises(mergekit_ext.errors.ConfigError, match="codes of a quantised model"):
        config = MergeConfiguration.model_validate(document)
        mergekit_ext.merge(config, tmp_path / "out", MergeOptions(quiet=True))
