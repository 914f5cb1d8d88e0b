"""Quantised inputs: merges are those of the models that transformers dequantises them to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_ext
import peft_merge
from mergekit_ext.io import quantised
from mergekit_ext.io.headers import read_folder
from tests import quantised as small
from tests.host.small import checked, merging
from tests.models import command_here, state, write_yaml
from tests.reference import quantised as reference

for _library in ("bitsandbytes", "compressed_tensors"):
    pytest.importorskip(_library)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
UP = "model.layers.0.mlp.up_proj"
AUTOFP8 = ("q_proj.input_scale", "kv_scale")  # of activations
UNREAD = ("hqq", "nvfp4", "fbgemm_fp8", "torchao", "quanto", "mxfp8", "modelopt", "auto-round")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A plain base, and a model of each kind: quantised, and as transformers dequantises it."""
    root, found = tmp_path_factory.mktemp("quantised"), {}
    small.llama().save_pretrained(root / "base")
    found["base"] = root / "base", root / "base"
    for seed, kind in enumerate(small.KINDS, 1):
        folder = small.made(root / kind, kind, seed)
        found[kind] = folder, small.dequantised(folder, root / "plain" / kind)
    return found


def merged(document: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MergeConfiguration.model_validate(document)
        mergekit_ext.merge(config, out, MergeOptions(quiet=True, copy_tokenizer=False))
    return state(out)


def read(folder: Path) -> dict[str, torch.Tensor]:
    config = transformers.AutoConfig.from_pretrained(folder)
    headers = quantised.dequantised(read_folder(folder), quantised.detach(config), folder)
    assert "quantization_config" not in config.to_dict()
    tensors = {name: header.load() for name, header in headers.items()}
    assert all(tensors[n].shape == h.shape for n, h in headers.items())
    assert all(h.nbytes == tensors[n].nbytes for n, h in headers.items())
    return tensors


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], t) for n, t in other.items())


@pytest.mark.parametrize("kind", small.KINDS)
def test_weights_are_those_of_transformers(kind: str, models: dict) -> None:
    folder, plain = models[kind]
    assert equal(read(folder), state(plain))


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    folder = tmp_path / "stored"
    small.mxfp4(folder)
    plain = small.dequantised(folder, tmp_path / "plain")
    assert equal(read(folder), state(plain))
    assert not checked(merging(plain, folder)).problems


def test_scales_under_the_names_of_autofp8(models: dict, tmp_path: Path) -> None:
    folder, plain = models["fp8-tensor"]
    stored = load_file(folder / "model.safetensors")
    renamed = {name.removesuffix("_inv"): tensor for name, tensor in stored.items()}
    used = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in AUTOFP8}
    save_file(renamed | used, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert equal(read(tmp_path), state(plain))


def test_blocks_that_do_not_divide_a_weight(tmp_path: Path) -> None:
    small.llama(1).save_pretrained(tmp_path)
    small.fp8(tmp_path, (40, 48))
    stored, name = load_file(tmp_path / "model.safetensors"), f"{UP}.weight"
    exact = reference.from_blocks(stored[name], stored[f"{name}_scale_inv"], (40, 48))
    assert torch.equal(read(tmp_path)[name], exact.bfloat16())


@pytest.mark.parametrize(
    ("bits", "form", "ordered"),
    [
        (4, "gptq", False),
        (4, "gptq_v2", True),
        (2, "gptq", True),
        (3, "gptq", False),
        (8, "gptq", False),
    ],
)
def test_gptq(bits: int, form: str, ordered: bool, tmp_path: Path) -> None:
    small.llama(1).save_pretrained(tmp_path)
    exact = small.gptq(tmp_path, bits, form, ordered)
    found = read(tmp_path)
    assert found.keys() == small.llama().state_dict().keys()
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in exact.items())


def test_awq(tmp_path: Path) -> None:
    small.llama(1).save_pretrained(tmp_path)
    exact = small.awq(tmp_path)
    found = read(tmp_path)
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in exact.items())


def test_a_merge_of_every_kind(models: dict, tmp_path: Path) -> None:
    """As models beside plain ones, in dtypes that are wider, too."""
    base, *others = models.values()
    wide = {"dtype": "float32", "out_dtype": "bfloat16"}
    found = merged(merging(base[0], *(q for q, _ in others[::3]), **wide), tmp_path / "wide")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    out = tmp_path / "out"
    found = merged(merging(base[0], *(q for q, _ in others)), out)
    assert equal(found, merged(merging(base[0], *(p for _, p in others)), tmp_path / "plain"))
    content = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in content and content["dtype"] == "bfloat16"
    report = json.loads((out / "merge_report.json").read_text())
    assert list(report["dequantised"].values())[::8] == ["fp8", "nf4"]
    assert "| bitsandbytes-nf4 | nf4 |" in (out / "README.md").read_text()
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())


def test_a_quantised_base_of_a_flexmerge(models: dict, tmp_path: Path) -> None:
    kinds = ("fp8-block", "bitsandbytes-nf4", "int4")
    found = []
    for at in range(2):
        base, *others = (models[kind][at] for kind in kinds)
        document = merging(base, *others, method="flexmerge", parameters={"target_size": 1.5})
        merged(document, tmp_path / str(at))
        folder = tmp_path / str(at) / kinds[1]
        found.append(state(folder))
        report = json.loads((tmp_path / str(at) / "merge_report.json").read_text())
        assert [*report.get("dequantised", {}).values()] == ["nf4", "int4", "fp8"][: 3 - 3 * at]
        assert "quantization_config" not in (folder / "config.json").read_text()
    assert equal(*found)


@pytest.mark.parametrize("method", ["nan", "flexmerge"])
def test_an_adapter_on_a_base_of_4_bits(method: str, models: dict, tmp_path: Path) -> None:
    quantised_base, plain = models["bitsandbytes-nf4"]
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    rest = {"parameters": {"target_size": 1}} if method == "flexmerge" else {}
    found = []
    for at, folder in enumerate((quantised_base, plain)):
        out, other = tmp_path / str(at), models["fp8-tensor"][at]
        document = merging(folder, f"{folder}+{tmp_path / 'lora'}", other, method=method, **rest)
        merged(document, out)
        found.append({n: t for f in out.rglob("*.safetensors") for n, t in load_file(f).items()})
    assert equal(*found)


def test_an_adapter_is_extracted_from_quantised_models(models: dict, tmp_path: Path) -> None:
    found = []
    for at in range(2):
        base, model = (models[kind][at] for kind in ("int8", "fp8-tensor"))
        peft_merge.extract(base, model, tmp_path / str(at), rank=2)
        found.append(load_file(tmp_path / str(at) / "adapter_model.safetensors"))
    assert equal(*found)


def test_a_method_of_mergekit_under_its_own_command(models: dict, tmp_path: Path) -> None:
    found = []
    for at in range(2):
        entries = [
            {"model": str(models[kind][at]), "parameters": {"weight": 0.5}}
            for kind in ("fp8-block", "bitsandbytes-int8")
        ]
        document = {"merge_method": "linear", "models": entries}
        file = write_yaml(tmp_path / "linear.yml", document)
        done = command_here("mergekit-yaml", file, tmp_path / str(at), "--no-copy-tokenizer")
        assert done.returncode == 0, done.stderr
        found.append(state(tmp_path / str(at)))
    assert equal(*found)


# Refusals


def settings(**changes: Any):
    def change(content: dict, tensors: dict) -> None:
        content["quantization_config"] |= changes

    return change


def compressed_as(form: str):
    def change(content: dict, tensors: dict) -> None:
        content["quantization_config"]["config_groups"]["group_0"]["format"] = form

    return change


def undescribed(content: dict, tensors: dict) -> None:
    del content["quantization_config"]


def without(name: str):
    return lambda content, tensors: tensors.pop(f"{UP}.{name}")


def no_codes(content: dict, tensors: dict) -> None:
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        del tensors[name]
        tensors[name.removesuffix("_scale_inv")] = torch.zeros(64, 64).bfloat16()


def another_shape(content: dict, tensors: dict) -> None:
    tensors[f"{UP}.weight_scale_inv"] = torch.ones(7, 7)


def hostile(content: dict, tensors: dict) -> None:
    tensors[f"{UP}.weight_shape"] = torch.tensor([2**40, 2**40])


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("fp8-block", without("weight_scale_inv"), "codes or scales without the other"),
        ("fp8-block", without("weight"), "without weight"),
        ("fp8-block", another_shape, "[7, 7] scales"),
        ("fp8-block", no_codes, "no codes in its files"),
        *(("fp8-block", settings(quant_method=n), f"quantised by {n}") for n in UNREAD),
        ("fp8-block", settings(quant_method="gptq", bits=4), "codes or scales without the other"),
        ("fp8-block", settings(quant_method="gptq", bits=5), "5 bits"),
        ("fp8-block", settings(quant_method="awq", version="marlin"), "layout marlin"),
        ("fp8-block", undescribed, "codes of a quantised model"),
        ("int4", hostile, "the shape"),
        ("int4", without("weight_shape"), "weight_shape"),
        ("int4", settings(config_groups={}), "no groups"),
        ("int4", compressed_as("nvfp4-pack-quantized"), "the format nvfp4-pack-quantized"),
        ("int4", settings(transform_config={"config_groups": {}}), "transformed"),
        ("bitsandbytes-int8", without("SCB"), "codes or scales without"),
        ("bitsandbytes-nf4", without("weight.absmax"), "without weight.absmax"),
    ],
)
def test_what_cannot_be_read(
    kind: str, change: Any, said: str, models: dict, tmp_path: Path
) -> None:
    folder, _ = models[kind]
    tensors = load_file(folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    change(content, tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(content))
    problems = checked(merging(models["base"][0], tmp_path)).problems
    assert len(problems) == 1 and said in problems[0].found, [*map(str, problems)]
    assert "quantisation" in problems[0].remedy


@pytest.mark.parametrize(
    ("kind", "library"), [("int8", "compressed-tensors"), ("bitsandbytes-fp4", "bitsandbytes")]
)
def test_a_library_that_is_not_installed(
    kind: str, library: str, models: dict, monkeypatch: Any
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    (problem,) = checked(merging(models["base"][0], models[kind][0])).problems
    assert problem.remedy == f"pip install 'mergekit-ext[{library}]'"


def test_layers_that_store_their_weights_transposed(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(tmp_path)
    small.bitsandbytes(tmp_path, load_in_8bit=True)
    problem, *_ = checked(merging(tmp_path, tmp_path)).problems
    assert "another shape" in problem.found
