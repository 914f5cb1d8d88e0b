"""``base+adapter`` inputs: the same tensors as when PEFT merges first, and nothing else written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import IA3Config, LoraConfig
from transformers import LlamaForCausalLM

from mergekit_ext.errors import ConfigError, MergeWarning, NonFiniteError
from mergekit_ext.host.adapters.loader import open_model
from tests import models as small
from tests.host.adapters import merged_with_peft, opened, saved_adapter, saved_base
from tests.host.flexmerge_models import as_index_says

QUIET = MergeOptions(quiet=True)
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3},
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "whole": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
}
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


class Case:
    """A base, its adapters, and the models that PEFT makes of them."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self.base = saved_base(folder / "base", dtype=dtype)
        self.adapters, self.wholes = {}, {}
        for seed, (name, config) in enumerate(CONFIGS.items()):
            path = saved_adapter(self.base, folder / name, config, seed, LlamaForCausalLM)
            self.adapters[name] = path
            self.wholes[name] = merged_with_peft(
                self.base, path, folder / f"{name}-whole", LlamaForCausalLM
            )

    def adapted(self, *names: str) -> list[str]:
        return [f"{self.base}+{self.adapters[name]}" for name in names]

    def whole(self, *names: str) -> list[str]:
        return [str(self.wholes[name]) for name in names]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"), request.param)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("exact"), torch.float32)


def configuration(method, models, base, parameters=None, **keys):
    content = small.config(method, models, base, parameters, **keys)
    return MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(content)))


def compare(found: Path, wanted: Path, tolerance: float) -> None:
    ours, theirs = small.state(found), small.state(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        torch.testing.assert_close(
            tensor.double(), theirs[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("names", [["lora"], ["patterns"], ["ia3"], ["whole"]], ids=str)
def test_one_adapter_is_what_peft_merges(case, names, tmp_path):
    for source, out in ((case.adapted, "ours"), (case.whole, "theirs")):
        config = configuration("linear", source(*names), None, {"weight": 1.0})
        run_merge(config, str(tmp_path / out), QUIET)
    compare(tmp_path / "ours", tmp_path / "theirs", PRECISION[case.dtype])
    assert any(
        not torch.equal(tensor, small.state(case.base)[name])
        for name, tensor in small.state(tmp_path / "ours").items()
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 0.5}),
        ("task_arithmetic", {"weight": 0.5}),
        ("ties", {"weight": 0.7, "density": 0.5}),
        ("nan", {}),
        ("nan_ties", {"density": 0.5, "granularity": "model"}),
        ("lore", {"mu_relative": 0.3, "lambda": 0.5}),
    ],
)
def test_methods_see_the_same_models(exact, method, parameters, tmp_path):
    for source, out in ((exact.adapted, "ours"), (exact.whole, "theirs")):
        base = exact.base if method != "linear" else None
        config = configuration(method, source("lora", "ia3", "patterns"), base, parameters)
        run_merge(config, str(tmp_path / out), QUIET)
    compare(tmp_path / "ours", tmp_path / "theirs", 2e-4 if method == "lore" else 2e-5)


def test_many_adapters_open_their_base_once(exact):
    cache = LoaderCache()
    cache.loaders.clear()
    cache.setup(QUIET)
    references = [ModelReference.parse(name) for name in exact.adapted("lora", "ia3")]
    one, two = (cache.get(reference) for reference in references)
    name = "model.layers.0.self_attn.v_proj.weight"
    tensors = [loader.get_tensor(name) for loader in (one, two)]
    assert not torch.equal(*tensors)
    assert one.base is two.base
    assert cache.get(references[0]) is one
    cache.loaders.clear()


def test_adapted_tensors_are_rounded_once(tmp_path):
    """A half-precision base merged in float32 keeps changes smaller than its rounding."""
    base = saved_base(tmp_path / "base", dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = saved_adapter(base, tmp_path / "adapter", config, 1, LlamaForCausalLM)
    wide = tmp_path / "wide"
    LlamaForCausalLM.from_pretrained(base).float().save_pretrained(wide)
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = merged_with_peft(wide, adapter, tmp_path / "whole", LlamaForCausalLM)
    merged = small.state(whole)[name]
    content = configuration("linear", [f"{base}+{adapter}"], None, {"weight": 1.0}, dtype="float32")
    run_merge(content, str(tmp_path / "out"), QUIET)
    found = small.state(tmp_path / "out")[name]
    torch.testing.assert_close(found, merged, rtol=1e-6, atol=1e-6)
    assert (merged.bfloat16().float() - merged).abs().max() > 1e-4  # it would have been seen
    half = configuration("linear", [f"{base}+{adapter}"], None, {"weight": 1.0})
    run_merge(half, str(tmp_path / "half"), MergeOptions(quiet=True, lora_merge_dtype="float32"))
    torch.testing.assert_close(small.state(tmp_path / "half")[name], merged, rtol=1e-6, atol=1e-6)


def flexmerged(models, names, base, size, folder, **options):
    content = small.config("flexmerge", models, base, {"target_size": size, "algorithm": "average"})
    for model, name in zip(content["models"], names, strict=True):
        model["parameters"] = {"task": name}
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(content))),
        str(folder),
        MergeOptions(quiet=True, **options),
    )
    return folder


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_flexmerge(case, size, tmp_path):
    names = list(CONFIGS)
    ours = flexmerged(case.adapted(*names), names, case.base, size, tmp_path / "ours")
    theirs = flexmerged(case.whole(*names), names, case.base, size, tmp_path / "theirs")
    for name in names:
        found, wanted = as_index_says(ours / name), as_index_says(theirs / name)
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(
                tensor, wanted[key], rtol=PRECISION[case.dtype], atol=PRECISION[case.dtype]
            )


def test_flexmerge_in_the_dtype_asked_for(tmp_path):
    base = saved_base(tmp_path / "base", dtype=torch.bfloat16)
    wide = tmp_path / "wide"
    LlamaForCausalLM.from_pretrained(base).float().save_pretrained(wide)
    names, ours, theirs = ["lora", "ia3"], [], []
    for seed, name in enumerate(names):
        path = saved_adapter(base, tmp_path / name, CONFIGS[name], seed, LlamaForCausalLM)
        ours.append(f"{base}+{path}")
        theirs.append(merged_with_peft(wide, path, tmp_path / f"{name}-whole", LlamaForCausalLM))
    options = {"lora_merge_dtype": "float32"}
    found = flexmerged(ours, names, base, 2.0, tmp_path / "ours", **options)
    for name, whole in zip(names, theirs, strict=True):
        state, wanted = as_index_says(found / name), small.state(whole)
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-6, atol=1e-6)


def test_a_broken_adapter_stops_the_merge(exact, tmp_path):
    from safetensors.torch import load_file, save_file

    file = exact.adapters["lora"] / "adapter_model.safetensors"
    copy = tmp_path / "nan"
    copy.mkdir()
    (copy / "adapter_config.json").write_bytes(
        (exact.adapters["lora"] / "adapter_config.json").read_bytes()
    )
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, copy / file.name, {"format": "pt"})
    content = configuration("nan", [f"{exact.base}+{copy}", *exact.adapted("ia3")], exact.base)
    with pytest.raises(NonFiniteError, match="nan"):
        run_merge(content, str(tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_the_cache_is_not_used_and_said_not_to_be(exact, tmp_path):
    options = MergeOptions(quiet=True, lora_merge_cache=str(tmp_path / "cache"))
    for method in ("linear", "nan"):
        base = None if method == "linear" else exact.base
        parameters = {"weight": 1.0}
        content = configuration(method, exact.adapted("lora", "ia3"), base, parameters)
        with pytest.warns(MergeWarning, match="--lora-merge-cache"):
            run_merge(content, str(tmp_path / method), options)
    assert {path.name for path in tmp_path.iterdir()} == {"linear", "nan"}


def test_mergekits_own_way(exact, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEKIT_EXT_ADAPTERS", "0")
    content = configuration("linear", exact.adapted("lora", "ia3"), None, {"weight": 0.5})
    cache = tmp_path / "cache"
    run_merge(
        content, str(tmp_path / "theirs"), QUIET.model_copy(update={"lora_merge_cache": str(cache)})
    )
    assert len(list(cache.iterdir())) == 2
    LoaderCache.loaders.clear()
    monkeypatch.delenv("MERGEKIT_EXT_ADAPTERS")
    run_merge(content, str(tmp_path / "ours"), QUIET)
    compare(tmp_path / "ours", tmp_path / "theirs", 1e-5)


def test_stock_methods_stop_before_work_too(exact, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    dora = saved_adapter(exact.base, tmp_path / "dora", config, 1, LlamaForCausalLM)
    content = configuration("linear", [f"{exact.base}+{dora}"], None, {"weight": 1.0})
    with pytest.raises(ConfigError, match="DoRA") as caught:
        run_merge(content, str(tmp_path / "out"), QUIET)
    (problem,) = caught.value.problems
    assert problem.where.startswith("models[0].model")
    assert "MERGEKIT_EXT_ADAPTERS=0" in problem.remedy
    assert not (tmp_path / "out").exists()


def test_adapters_are_applied_on_the_device(exact, device):
    """And the tensor comes to where it was asked for."""
    reference = ModelReference.parse(exact.adapted("lora")[0])
    name = "model.layers.0.self_attn.q_proj.weight"
    base = ModelReference.parse(str(exact.base)).lazy_loader()
    config = reference.config()
    found = open_model(reference, base, config, str(device)).get_tensor(name)
    assert found.device.type == "cpu"
    wanted = small.state(exact.wholes["lora"])[name]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    there = open_model(reference, base, config).get_tensor(name, device=str(device))
    assert there.device.type == device.type


def test_a_tensor_that_is_not_there(exact):
    loader = opened(exact.adapted("lora")[0])
    assert loader.get_tensor("nothing", raise_on_missing=False) is None
    with pytest.raises(KeyError, match="nothing"):
        loader.get_tensor("nothing")
    name = "model.norm.weight"
    assert torch.equal(loader.get_tensor("nothing", aliases=[name]), small.state(exact.base)[name])


def test_what_would_look_at_the_base_alone_still_refuses(exact):
    """mergekit-moe opens models itself, and computes hidden states without the adapter."""
    with pytest.raises(AssertionError, match="LoRA not merged"):
        ModelReference.parse(exact.adapted("lora")[0]).lazy_loader()
