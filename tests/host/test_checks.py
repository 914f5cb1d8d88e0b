"""Checks before a merge: each kind of problem, its place, the nearest name and the remedy."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors
import torch
import transformers
import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.host.checks.flat import check_flat
from mergekit_ext.host.checks.merge import check_merge
from mergekit_ext.host.checks.report import CheckReport
from mergekit_ext.host.checks.schema import unknown_keys
from mergekit_ext.host.checks.source import check_source
from mergekit_ext.io import pickles
from mergekit_ext.io.headers import HeaderError, read_folder, read_safetensors
from mergekit_ext.methods import Inputs
from tests import models as small

LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.5}}


def llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small models, by name."""
    root = tmp_path_factory.mktemp("models")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("base", "a", "b", "c"):
        llama().save_pretrained(root / name)
    small.tokenizer(root / "a")
    llama(vocab_size=72).save_pretrained(root / "large_vocab")
    llama(intermediate_size=48).save_pretrained(root / "wide")
    llama(num_hidden_layers=4).save_pretrained(root / "deep")
    llama().to(torch.bfloat16).save_pretrained(root / "half")
    llama(tie_word_embeddings=True).save_pretrained(root / "tied")
    llama().save_pretrained(root / "sharded", max_shard_size="10KB")
    bert = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    for name in ("bert_a", "bert_b"):
        BertForSequenceClassification(bert).save_pretrained(root / name)
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2}
    t5 = T5Config(**sizes, num_heads=2, feed_forward_proj="gated-gelu")
    old_t5 = T5Config(**sizes, num_heads=2, feed_forward_proj="relu")
    for name, config in (("t5_a", t5), ("t5_b", t5), ("t5_old", old_t5)):
        T5ForConditionalGeneration(config).save_pretrained(root / name)
    vit = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    for name in ("vit_a", "vit_b"):
        ViTForImageClassification(vit).save_pretrained(root / name)
    return root


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a model's folder with changed tensors and configuration."""

    def make(name: str, change: Callable[[dict[str, Any]], Any], **config: Any) -> Path:
        folder = tmp_path / f"{name}_changed"
        folder.mkdir()
        tensors = load_file(models / name / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        settings = json.loads((models / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **config}))
        return folder

    return make


def entries(root: Path, *names: str | Path, **parameters: Any) -> list[dict[str, Any]]:
    extra = {"parameters": parameters} if parameters else {}
    return [{"model": str(root / name), **extra} for name in names]


def run(document: Mapping[str, Any], **options: Any) -> CheckReport:
    """Check one document through its YAML text."""
    ((_, report),) = check_source(yaml.safe_dump(dict(document)), MergeOptions(**options))
    return report


def at(report: CheckReport, where: str) -> Problem:
    """The one problem at a place."""
    found = [problem for problem in report.problems if problem.where == where]
    assert len(found) == 1, [str(problem) for problem in report.problems]
    return found[0]


def the(report: CheckReport) -> Problem:
    """The only problem."""
    assert len(report.problems) == 1, [str(problem) for problem in report.problems]
    return report.problems[0]


# --- fine merges -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "bert_", "t5_"])
def test_fine_merge_has_no_problem_and_the_right_estimate(models: Path, kind: str) -> None:
    report = run({**LINEAR, "models": entries(models, f"{kind}a", f"{kind}b")})
    assert report.problems == ()
    stored = [load_file(models / f"{kind}{x}" / "model.safetensors") for x in "ab"]
    size = sum(tensor.numel() for tensor in stored[0].values())
    assert report.estimate is not None
    assert report.estimate.bytes_read == 2 * size * 4
    assert report.estimate.parameters >= size  # a tied weight is written under each of its names
    assert report.estimate.bytes_written == report.estimate.parameters * 4
    largest = max(tensor.numel() for tensor in stored[0].values())
    assert report.estimate.bytes_held == largest * 4 * (
        1 + 8 * 2 + 6 + 2 * 2 + 16
    )  # `memory.working`
    report.raise_for_problems("this merge")


def test_estimate_follows_dtypes_and_shards(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "half", "a"), "out_dtype": "bfloat16"}
    report = run(document, out_shard_size=1000)
    assert report.problems == () and report.estimate is not None
    count = sum(t.numel() for t in load_file(models / "a" / "model.safetensors").values())
    assert report.estimate.bytes_read == count * 6
    assert report.estimate.bytes_written == count * 2
    # The result, the method's copies and pieces, and one input that is converted when it is read.
    assert report.estimate.bytes_held == 64 * 16 * (2 + 4 * (22 + 20) + 4)
    assert any("BF16, F32" in note for note in report.notes)


def test_stock_slerp_with_slices_gradients_and_filters(models: Path) -> None:
    sources = [{"model": str(models / name), "layer_range": [0, 2]} for name in "ab"]
    report = run(
        {
            "merge_method": "slerp",
            "base_model": str(models / "a"),
            "slices": [{"sources": sources}],
            "parameters": {
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 1]},
                    {"filter": "mlp", "value": [1, 0.5, 0]},
                    {"value": 0.5},
                ]
            },
            "dtype": "bfloat16",
        }
    )
    assert report.problems == () and report.notes == ()


def test_sharded_models_and_the_configuration_is_left_alone(models: Path) -> None:
    config = MergeConfiguration.model_validate(
        {**LINEAR, "models": entries(models, "sharded", "a")}
    )
    before = config.model_copy(deep=True)
    assert check_merge(config, MergeOptions()).problems == ()
    assert config == before


@pytest.mark.only_checked("reading is forbidden")
def test_no_weight_is_read_and_no_cache_is_filled(
    models: Path, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(LoaderCache, "get", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    before = dict(LoaderCache.loaders)
    assert run({**LINEAR, "models": entries(models, "a", "b")}).problems == ()
    assert LoaderCache.loaders == before


@pytest.mark.only_checked("70 GB")
def test_two_thousand_tensors_are_checked_from_headers_of_sparse_files(tmp_path: Path) -> None:
    config = llama(num_hidden_layers=1).config
    config.num_hidden_layers, config.architectures = 222, ["LlamaForCausalLM"]
    config.hidden_size, config.intermediate_size, config.head_dim = 4096, 8192, 2048
    square, wide, long, norm = [4096, 4096], [8192, 4096], [64, 4096], [4096]
    layer = {f"self_attn.{x}_proj.weight": square for x in "qkvo"}
    layer |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide}
    layer |= {"mlp.down_proj.weight": wide[::-1]}
    layer |= {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm}
    names = {f"model.layers.{i}.{rest}": layer[rest] for i in range(222) for rest in layer}
    names |= {"model.embed_tokens.weight": long, "lm_head.weight": long}
    names["model.norm.weight"] = norm
    header, end = {}, 0
    for name, shape in names.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    for folder in (tmp_path / "a", tmp_path / "b"):
        config.save_pretrained(folder)
        raw = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)
    report = run({**LINEAR, "models": entries(tmp_path, "a", "b")})
    assert report.problems == () and report.estimate is not None
    assert report.estimate.tensors == len(names) == 2001
    assert report.estimate.bytes_read == 2 * end


# --- keys ------------------------------------------------------------------------------------


def test_unknown_keys_at_every_level() -> None:
    text = """
merge_metod: linear
merge_method: linear
models:
  - model: {model: {path: x, revison: main}}
    parameters: {weight: {value: 1, fliter: mlp}}
    wieght: 1
modules:
  text:
    slices:
      - sources: [{model: x, layer_range: [0, 1], parametres: {}}]
        residual_wieght: 1
tokenizer: {source: union, tokens: {a: {source: {kind: zero}, forse: true}}}
"""
    found = {problem.where: problem.remedy for problem in unknown_keys(text)}
    assert found == {
        "merge_metod": "Write `merge_method`.",
        "models[0].model.model.revison": "Write `revision`.",
        "models[0].parameters.weight.fliter": "Write `filter`.",
        "models[0].wieght": "Take it out, or use one of: model, parameters.",
        "modules.text.slices[0].sources[0].parametres": "Write `parameters`.",
        "modules.text.slices[0].residual_wieght": "Write `residual_weight`.",
        "tokenizer.tokens.a.forse": "Write `force`.",
    }


def test_misplaced_parameter_and_repeated_key() -> None:
    text = (
        "merge_method: linear\nmodels:\n- model: x\n  weight: 1\ndtype: float32\ndtype: float16\n"
    )
    found = {problem.where: problem for problem in unknown_keys(text)}
    assert found["models[0].weight"].remedy == "Put `weight:` under `parameters:`."
    assert "lines 5 and 6" in found["dtype"].found


def test_keys_are_only_checked_where_they_can_be_seen(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b"), "dytpe": "float32"}
    config = MergeConfiguration.model_validate(document)
    assert check_merge(config, MergeOptions()).problems == ()
    assert the(check_merge(config, MergeOptions(), yaml.safe_dump(document))).where == "dytpe"
    assert [p.where for p in unknown_keys({"merge_method": "ties", "name": "x"})] == []


# --- YAML and schema -------------------------------------------------------------------------


def test_text_that_is_not_yaml() -> None:
    ((_, report),) = check_source("merge_method: [linear\nmodels: {", MergeOptions())
    assert the(report).where.startswith("line 2, column")
    ((_, report),) = check_source("", MergeOptions())
    assert "no document" in the(report).found
    ((_, report),) = check_source("just text", MergeOptions())
    assert "just text" in the(report).found


def test_schema_errors_are_located(models: Path) -> None:
    report = run(
        {
            "models": [{"model": str(models / "a"), "parameters": {"weight": {"filter": "x"}}}],
            "slices": [{"sources": [{"model": "x", "layer_range": [0]}]}],
            "dytpe": "float32",
        }
    )
    assert at(report, "merge_method").found == "nothing"
    assert "gradient" in at(report, "models[0].parameters.weight").expected
    assert at(report, "models, slices, modules").found == "models and slices"
    assert at(report, "dytpe").remedy == "Write `dtype`."
    assert any(p.where.startswith("slices[0].sources[0].layer_range") for p in report.problems)


def test_no_inputs_at_all() -> None:
    assert at(run({"merge_method": "linear"}), "models, slices, modules").remedy.startswith("Add")


# --- settings --------------------------------------------------------------------------------


def test_dtypes_template_and_tokenizer(models: Path) -> None:
    report = run(
        {
            **LINEAR,
            "models": entries(models, "a", "b"),
            "dtype": "bfloat61",
            "out_dtype": "int64",
            "chat_template": "chatlm",
            "tokenizer": {"source": "base"},
        },
        lora_merge_dtype="f16",
    )
    assert at(report, "dtype").remedy == "Write `bfloat16`."
    assert "float16" in at(report, "out_dtype").expected
    assert at(report, "--lora-merge-dtype").found == "'f16'"
    assert at(report, "chat_template").remedy == "Write `chatml`."
    assert "base_model" in at(report, "tokenizer.source").remedy


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
@pytest.mark.parametrize("method", ["linear", "flexmerge"])
def test_a_device_that_is_not_there(models: Path, method: str, device: str) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b"), "merge_method": method}
    problem = at(run(document, device=device), "--device")
    assert problem.found.startswith(f"{device}, which cannot be used (")
    assert problem.expected.startswith("one of cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_cuda_that_is_not_there(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b")}
    assert "cannot be used" in at(run(document, cuda=True), "--cuda").found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_multi_gpu_without_any(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b")}
    assert the(run(document, multi_gpu=True)).where == "--multi-gpu"


def test_parameters_that_are_wrong_together(models: Path) -> None:
    document = {
        "merge_method": "nan_della",
        "base_model": str(models / "base"),
        "models": [
            *entries(models, "a", density=0.9),
            *entries(models, "b", density=[0.5, 0.1], epsilon=0.2),
            *entries(models, "c", density=0.5),
        ],
    }
    report = run(document)
    assert [problem.where for problem in report.problems] == [
        "parameters.epsilon",
        "models[1].parameters.epsilon",
    ]
    assert report.problems[0].found == "0.15 with a density of 0.9"
    assert "less than 0.1," in report.problems[0].expected
    document["models"] = entries(models, "a", "b", "c")
    document["parameters"] = {"density": 0.9}
    assert the(run(document)).where == "parameters.epsilon"
    document["parameters"] = {"density": 0.9, "epsilon": 0.05}
    assert not run(document).problems
    assert not run({**document, "merge_method": "nan_ties", "parameters": {}}).problems


@pytest.mark.only_checked("a tokenizer on the Hub")
def test_tokenizer_files_are_needed_where_the_tokenizer_comes_from(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b"), "tokenizer_source": "x"}
    assert run(document).problems == ()  # a name on the Hub; the first model has a tokenizer
    document["tokenizer_source"] = str(models / "b")
    assert f"no tokenizer in {models / 'b'}" in the(run(document)).found
    document["tokenizer_source"] = "./nowhere"
    assert "does not exist" in the(run(document)).found
    document |= {"tokenizer_source": "union", "models": entries(models, "b", "a")}
    assert f"no tokenizer in {models / 'b'}" in the(run(document)).found


# --- parameters ------------------------------------------------------------------------------


def test_unknown_method_names_the_nearest(models: Path) -> None:
    report = run({**LINEAR, "merge_method": "task_arithmatic", "models": entries(models, "a")})
    assert the(report).where == "merge_method"
    assert the(report).remedy == "Write `task_arithmetic`."


def test_unknown_misplaced_and_invalid_parameters(models: Path) -> None:
    report = run(
        {
            "merge_method": "ties",
            "base_model": str(models / "base"),
            "models": [
                *entries(models, "a", weigth=1, weight=1, normalize=True),
                *entries(models, "b", weight=["0.1", "x"], density=[]),
            ],
            "parameters": {"lamda": 1, "int8_mask": [{"filter": "mlp", "value": "maybe"}]},
        }
    )
    assert at(report, "models[0].parameters.weigth").remedy == "Write `weight`."
    assert at(report, "parameters.lamda").remedy == "Write `lambda`."
    assert "Move `normalize:`" in at(report, "models[0].parameters.normalize").remedy
    assert "valid number" in at(report, "models[1].parameters.weight[1]").expected
    assert at(report, "models[1].parameters.density").found == "an empty list"
    assert "boolean" in at(report, "parameters.int8_mask[0].value").expected
    assert len(report.problems) == 6


def test_required_parameter_missing_for_one_model(models: Path) -> None:
    report = run(
        {
            "merge_method": "linear",
            "models": [*entries(models, "a", weight=1), *entries(models, "b")],
        }
    )
    assert the(report).where == "models[1].parameters.weight"
    assert str(models / "b") in the(report).expected
    assert "Add `weight:`" in the(report).remedy


def test_base_of_a_method_without_base_is_one_more_input(models: Path) -> None:
    report = run(
        {
            "merge_method": "linear",
            "base_model": str(models / "base"),
            "models": entries(models, "a", "b", weight=1),
        }
    )
    assert the(report).where == "base_model"
    assert "remove `base_model:`" in the(report).remedy


def test_missing_shared_parameter(models: Path) -> None:
    report = run(
        {
            "merge_method": "slerp",
            "base_model": str(models / "a"),
            "models": entries(models, "a", "b"),
        }
    )
    assert the(report).where == "parameters.t"


def test_filter_that_leaves_tensors_without_a_value(models: Path) -> None:
    report = run(
        {
            "merge_method": "linear",
            "models": [
                *entries(models, "a", weight=[{"filter": "self_attn", "value": 1}]),
                *entries(models, "b", weight=1),
            ],
        }
    )
    problem = the(report)
    assert problem.where == "models[0].parameters.weight"
    assert "13 tensors" in problem.found and "model.embed_tokens.weight" in problem.found
    assert "without `filter:`" in problem.remedy


def test_filter_that_matches_nothing_is_a_note(models: Path) -> None:
    weight = [{"filter": "attention.wq", "value": 1}, {"value": 2}]
    document = {
        "merge_method": "linear",
        "models": entries(models, "a", "b"),
        "parameters": {"weight": weight},
    }
    report = run(document)
    assert report.problems == ()
    assert any("'attention.wq' matches no tensor" in note for note in report.notes)


def test_gradient_whose_middle_is_invalid(models: Path) -> None:
    report = run(
        {
            "merge_method": "karcher",
            "models": entries(models, "deep"),
            "parameters": {"max_iter": [1, 5]},
        }
    )
    problem = at(report, "parameters.max_iter")
    assert "between the values of a gradient" in problem.found
    assert "integer" in problem.expected


def test_parameter_of_the_base_is_a_note(models: Path) -> None:
    report = run(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(models / "base"),
            "models": entries(models, "base", "a", weight=1),
        }
    )
    assert report.problems == ()
    assert any("models[0].parameters.weight has no effect" in note for note in report.notes)


# --- contract --------------------------------------------------------------------------------


def test_all_violations_of_a_contract(models: Path) -> None:
    report = run(
        {
            "merge_method": "slerp",
            "models": entries(models, "a", "b", "c", "c"),
            "parameters": {"t": 0.5},
        }
    )
    assert "`slerp` needs" in at(report, "base_model").expected
    assert "Add `base_model:`" in at(report, "base_model").remedy
    assert at(report, "models").found == "3 models"
    assert "exactly 2" in at(report, "models").expected
    assert "models[2]" in at(report, "models[3].model").found


def test_too_few_models_and_base_outside_of_a_slice(models: Path) -> None:
    report = run(
        {
            "merge_method": "model_stock",
            "base_model": str(models / "base"),
            "models": entries(models, "a"),
        }
    )
    assert "at least 3 models" in the(report).expected
    assert "the base is one of them" in the(report).found
    sources = [{"model": str(models / name), "layer_range": [0, 2]} for name in "ab"]
    report = run(
        {
            "merge_method": "ties",
            "base_model": str(models / "base"),
            "slices": [{"sources": sources}],
            "parameters": {"weight": 1},
        }
    )
    assert the(report).where == "slices[0].sources"
    assert "Add a source" in the(report).remedy


# --- the method's own rules ------------------------------------------------------------------


class Fake(GroupMergeMethod):
    """A method with rules of its own, as the project's methods have them."""

    spec = MergeMethodSpec(
        name="fake",
        parameters=(
            ParameterSpec("mu", float, ParameterScope.SHARED, default=1.0),
            ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0),
        ),
        contract=InputContract(base=BasePolicy.FORBIDDEN),
    )

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        raise AssertionError("nothing is merged by a check")

    def problems(self, shared: Mapping[str, Any], inputs: Inputs) -> Iterable[Problem]:
        self.asked.append((dict(shared), inputs))
        if shared["mu"] > 5:
            yield Problem(f"{inputs.where}.mu", str(shared["mu"]), "at most 5", "Lower it.")

    def notes(self, shared: Mapping[str, Any], inputs: Inputs) -> Iterable[str]:
        yield f"mu is {shared['mu']}"

    def passes(self, shared: Mapping[str, Any]) -> int:
        return 2


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    method = Fake()
    monkeypatch.setitem(merge_methods.registry._METHODS, "fake", method)
    return method


@pytest.mark.only_checked("the method merges nothing")
def test_a_method_is_asked_once_for_each_set_of_shared_parameters(models: Path, fake: Fake) -> None:
    document = {"merge_method": "fake", "models": entries(models, "a", "b")}
    once = run(document)
    assert once.problems == () and once.notes == ("mu is 1.0",)
    assert fake.asked == [({"mu": 1.0}, Inputs(2, based=False))]
    linear = run({**LINEAR, "models": document["models"]})
    assert once.estimate is not None and linear.estimate is not None
    assert once.estimate.bytes_read == 2 * linear.estimate.bytes_read

    fake.asked.clear()
    mu = [{"filter": "mlp", "value": 7}, {"value": 2}]
    report = run({**document, "parameters": {"mu": mu}})
    assert [asked[0]["mu"] for asked in fake.asked] == [2.0, 7.0]
    assert str(the(report)) == "parameters.mu: found 7.0; expected at most 5. Lower it."


def test_a_method_is_asked_even_when_no_model_can_be_read(tmp_path: Path, fake: Fake) -> None:
    report = run(
        {
            "merge_method": "fake",
            "models": entries(tmp_path, "x", "y"),
            "parameters": {"mu": 6},
        }
    )
    assert {p.where for p in report.problems} == {
        "parameters.mu",
        "models[0].model",
        "models[1].model",
    }


def test_forbidden_base(models: Path, fake: Fake) -> None:
    document = {"merge_method": "fake", "models": entries(models, "a", "b")}
    report = run({**document, "base_model": str(models / "base")})
    assert the(report).remedy == "Remove `base_model:`."


# --- models ----------------------------------------------------------------------------------


def test_paths_that_lead_nowhere(models: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    file = models / "a" / "model.safetensors"
    paths = [models / "large_vocap", empty, adapter, file.with_suffix(".json")]
    (tmp_path / "plain").write_text("")
    paths[3] = tmp_path / "plain"
    report = run({**LINEAR, "models": [{"model": str(path)} for path in paths]})
    assert str(models / "large_vocab") in at(report, "models[0].model").remedy
    found = [problem.found for problem in report.problems if problem.where == "models[1].model"]
    assert any("no weights" in text for text in found)
    assert any("no config.json" in text for text in found)
    assert "<base model>+" in at(report, "models[2].model").remedy
    assert "mergekit-pytorch" in at(report, "models[3].model").remedy


def test_home_is_not_expanded() -> None:
    report = run({**LINEAR, "models": [{"model": "~/model"}]})
    assert "does not expand" in the(report).remedy


def test_config_that_transformers_refuses(copy: Callable[..., Path]) -> None:
    folder = copy("a", lambda tensors: None, model_type="no_such_type")
    report = run({**LINEAR, "models": [{"model": str(folder)}]})
    assert "no_such_type" in the(report).found
    assert "--trust-remote-code" in the(report).remedy


def test_config_without_architecture(copy: Callable[..., Path]) -> None:
    folder = copy("a", lambda tensors: None, architectures=None)
    report = run({**LINEAR, "models": [{"model": str(folder)}]})
    assert "override_architecture" in the(report).remedy


def test_pickles_are_refused_or_checked_and_noted(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pickle"
    folder.mkdir()
    (folder / "config.json").write_bytes((models / "a" / "config.json").read_bytes())
    tensors = load_file(models / "a" / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    document = {**LINEAR, "models": entries(models, folder, "b")}
    refused = the(run(document))
    assert "pytorch_model.bin with a pickle" in refused.found
    assert "MERGEKIT_EXT_ALLOW_PICKLE=1" in refused.remedy
    monkeypatch.setenv("MERGEKIT_EXT_ALLOW_PICKLE", "1")
    report = run(document)
    assert report.problems == () and report.estimate is not None
    assert any("only tensors" in note for note in report.notes)
    torch.save({**tensors, "lm_head.weight": torch.zeros(3, 3)}, folder / "pytorch_model.bin")
    assert "[3, 3]" in the(run(document)).found
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert "torch.load refuses" in the(run(document)).found


def test_architectures_that_differ(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "bert_a")}
    problem = the(run(document))
    assert "BertForSequenceClassification" in problem.found
    assert "--allow-crimes" in problem.remedy
    assert "nothing in" in " ".join(p.found for p in run(document, allow_crimes=True).problems)


def test_table_that_does_not_fit_is_one_problem(models: Path) -> None:
    problem = the(run({**LINEAR, "models": entries(models, "t5_old")}))
    assert "8 tensors" in problem.where and problem.found == "nothing in any model"


def test_layers_that_mergekit_would_skip_silently(models: Path) -> None:
    report = run({**LINEAR, "models": entries(models, "vit_a", "vit_b")})
    problem = the(report)
    assert problem.where == "the output" and "32 tensors" in problem.found
    assert "vit.encoder.layer.0" in problem.found
    assert "mergekit-pytorch" in problem.remedy
    assert any("no table for ViTForImageClassification" in note for note in report.notes)


def test_hub_name_offline(monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    document = {**LINEAR, "models": [{"model": "someone/model"}]}
    assert "HF_HUB_OFFLINE" in the(run(document)).remedy
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((models / "a" / name).read_bytes())
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("1234")
    report = run(document, transformers_cache=str(tmp_path))
    assert f"Write the path of the cached copy, {snapshot}." in [
        problem.remedy for problem in report.problems
    ]


def test_hub_name_online_reads_metadata_only(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    headers = read_folder(models / "large_vocab")
    tensors = {
        name: SimpleNamespace(dtype=h.dtype, shape=list(h.shape), data_offsets=(0, h.nbytes))
        for name, h in headers.items()
    }
    metadata = SimpleNamespace(
        weight_map=dict.fromkeys(tensors, "model.safetensors"),
        files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)},
    )
    config = transformers.AutoConfig.from_pretrained(models / "large_vocab")
    read = transformers.AutoConfig.from_pretrained

    def from_pretrained(path: str, **options: Any) -> Any:
        return config if path == "someone/model" else read(path, **options)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: metadata)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    document = {**LINEAR, "models": [{"model": "someone/model"}, *entries(models, "a")]}
    assert "[72, 16] in someone/model" in the(run(document)).found

    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("404 Client Error")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", gone)
    assert "404 Client Error" in the(run(document)).found


@pytest.mark.only_checked("an empty adapter")
def test_base_with_adapter_by_mergekits_own_way(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MERGEKIT_EXT_ADAPTERS", "0")
    reference = f"{models / 'a'}+{tmp_path / 'adapter'}"
    document = {**LINEAR, "models": [{"model": reference}, *entries(models, "b")]}
    texts = [str(problem) for problem in run(document).problems]
    assert any("--lora-merge-cache" in text for text in texts)
    assert any("adapter, which does not exist" in text for text in texts)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    cache = tmp_path / "cache"
    assert "without weights" in the(run(document, lora_merge_cache=str(cache))).found
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert run(document, lora_merge_cache=str(cache)).problems == ()
    # An interrupted run leaves an empty folder, which mergekit takes for the merged model.
    model = MergeConfiguration.model_validate(document).models[0].model
    (cache / f"{model.model._unique_id()}_{model.lora._unique_id()}").mkdir(parents=True)
    assert the(run(document, lora_merge_cache=str(cache))).remedy.startswith("Delete ")


# --- weight files ----------------------------------------------------------------------------


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + raw + data)
    return path


def entry(begin: int, end: int, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, b"", 10**15, "header length"),
        ({}, b"", 2**63, "header length"),
        (b"{not json", b"", None, "not JSON"),
        (b"\xff\xfe", b"", None, "not JSON"),
        (b"[" * 20000, b"", None, "not JSON"),
        (b'{"a": 1, "a": 1}', b"", None, "twice"),
        ([], b"", None, "not an object"),
        ({"a": {"dtype": "F32"}}, b"", None, "malformed"),
        ({"a": entry(-4, 0)}, b"", None, "malformed"),
        ({"a": entry(0, 4, [True])}, bytes(4), None, "malformed"),
        ({"a": entry(0, 4, dtype="F33")}, bytes(4), None, "unknown dtype"),
        ({"a": entry(0, 4)}, bytes(2), None, "bytes 0 to 4 of 2"),
        ({"a": entry(0, 8)}, bytes(8), None, "8 bytes for a"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), None, "overlapping"),
        ({"a": entry(4, 8)}, bytes(8), None, "gap"),
        ({"a": entry(0, 4)}, bytes(9), None, "9 bytes of data"),
    ],
)
def test_hostile_headers(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
) -> None:
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(HeaderError, match=message):
        read_safetensors(path)


def test_sound_headers(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry(0, 4), "b": entry(4, 4, [0, 3], "BF16")}
    found = read_safetensors(write(tmp_path / "x.safetensors", header, bytes(4)))
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in found.items()} == {
        "a": ("F32", (1,), 4),
        "b": ("BF16", (0, 3), 0),
    }
    (tmp_path / "short.safetensors").write_bytes(b"\0")
    with pytest.raises(HeaderError, match="1 bytes"):
        read_safetensors(tmp_path / "short.safetensors")


def test_truncated_model_is_named(models: Path, copy: Callable[..., Path]) -> None:
    folder = copy("a", lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    report = run({**LINEAR, "models": entries(models, folder, "b")})
    assert "truncated" in the(report).expected and str(file) in the(report).found
    assert the(report).remedy == "Copy or download the file again."


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../other/model.safetensors"}, "outside of the model's folder"),
        ({"x": "/etc/passwd"}, "outside of the model's folder"),
        ({"x": "C:\\weights.safetensors"}, "outside of the model's folder"),
        ({"x": "..\\weights.safetensors"}, "outside of the model's folder"),
        ({"x": "model-00001-of-00002.safetensors"}, "does not exist"),
        ({"nowhere": "model.safetensors"}, "no tensor nowhere"),
        ({}, "empty `weight_map`"),
        (None, "empty `weight_map`"),
    ],
)
def test_hostile_indexes(copy: Callable[..., Path], weight_map: Any, message: str) -> None:
    folder = copy("a", lambda tensors: None)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    report = run({**LINEAR, "models": [{"model": str(folder)}]})
    assert message in the(report).found


# --- tensors ---------------------------------------------------------------------------------


def test_missing_tensors_are_grouped(models: Path, copy: Callable[..., Path]) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "mlp" in name]:
            del tensors[name]

    folder = copy("a", drop)
    problem = the(run({**LINEAR, "models": entries(models, folder, "b")}))
    assert problem.found.startswith("6 tensors (model.layers.0.mlp.")
    assert problem.where == "models[0].model" and f"missing in {folder}" in problem.found


def test_vocabularies_that_differ(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "large_vocab")}
    problem = the(run(document))
    assert "model.embed_tokens.weight" in problem.where and "lm_head.weight" in problem.where
    assert "[64, 16]" in problem.found and "[72, 16]" in problem.found
    assert "tokenizer:" in problem.remedy and "--unsafe-truncate-embeddings" in problem.remedy
    assert run(document, unsafe_truncate_embeddings=True).problems == ()
    assert run({**document, "tokenizer": {"source": "union"}}).problems == ()


def test_other_shapes_that_differ(models: Path) -> None:
    report = run({**LINEAR, "models": entries(models, "a", "wide")})
    up = next(problem for problem in report.problems if "mlp.up_proj" in problem.where)
    assert up.where.startswith("4 tensors (model.layers.0.mlp.")
    assert f"[32, 16] in {models / 'a'}, [48, 16] in {models / 'wide'}" in up.found
    assert up.remedy == "Take out the models that do not fit."
    assert len(report.problems) == 2  # the transposed shapes of down_proj are the other


def test_integers_and_float8(models: Path, copy: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    document = {**LINEAR, "models": entries(models, copy("a", change), "b")}
    report = run(document)
    assert "I32 in" in at(report, "model.norm.weight").found
    assert "dtype: bfloat16" in at(report, "lm_head.weight").remedy
    assert run({**document, "dtype": "bfloat16"}).problems == ()


def test_optional_tensor_that_only_some_models_have(
    models: Path, copy: Callable[..., Path]
) -> None:
    # A head may be read as the tied embedding, which every model has.
    tied = {"merge_method": "nuslerp", "models": entries(models, "a", "tied", weight=1)}
    assert run(tied).problems == ()

    name = "bert.embeddings.position_ids"
    folder = copy("bert_b", lambda tensors: tensors.update({name: torch.arange(32)[None]}))
    document = {"base_model": str(models / "bert_a"), "models": entries(models, folder, weight=1)}
    problem = the(run({**document, "merge_method": "ties"}))
    assert problem.where == name and str(models / "bert_a") in problem.found
    assert "Base input is not present" in problem.found
    del document["models"][0]["parameters"]
    parameters = {"t": 0.5}
    assert run({**document, "merge_method": "slerp", "parameters": parameters}).problems == ()


def test_slices(models: Path) -> None:
    def source(name: str, first: int, last: int) -> dict[str, Any]:
        return {"model": str(models / name), "layer_range": [first, last]}

    report = run(
        {
            **LINEAR,
            "slices": [
                {"sources": [source("a", 0, 2), source("deep", 2, 3)]},
                {"sources": [source("a", 1, 5), source("b", 0, 4)]},
                {"sources": [source("a", 0, 1), source("nowhere", 0, 1)]},
            ],
        }
    )
    assert "2 of" in at(report, "slices[0]").found and "1 of" in at(report, "slices[0]").found
    assert "[0, 2]" in at(report, "slices[1].sources[0].layer_range").expected
    assert at(report, "slices[2].sources[1].model").found.endswith("does not exist")


def test_models_of_different_depth(models: Path) -> None:
    problem = the(run({**LINEAR, "models": entries(models, "a", "deep")}))
    assert problem.where == "models" and "slices:" in problem.remedy


def test_unknown_module(models: Path) -> None:
    inner = {"models": entries(models, "t5_a", "t5_b")}
    report = run({**LINEAR, "modules": {"encoder": inner, "decodr": inner}})
    assert at(report, "modules.decodr").remedy == "Write `decoder`."
    assert any("no weights of decoder" in note for note in report.notes)


# --- several kinds at once -------------------------------------------------------------------


def test_ten_mistakes_are_listed_at_once(models: Path, tmp_path: Path) -> None:
    document = {
        "merge_method": "dare_ties",
        "dytpe": "float32",
        "out_dtype": "bfloat61",
        "chat_template": "chatlm",
        "models": [
            *entries(models, "a", weight=1, densty=0.5),
            *entries(models, "large_vocab", weight="much"),
            *entries(models, "b", normalize=True),
            *entries(models, "b", weight=1),
            *entries(tmp_path, "nowhere", weight=1),
        ],
        "parameters": {"lamda": 1},
    }
    report = run(document)
    places = [problem.where for problem in report.problems]
    assert len(places) >= 10
    assert set(places) >= {
        "dytpe",
        "out_dtype",
        "chat_template",
        "base_model",
        "models[0].parameters.densty",
        "models[1].parameters.weight",
        "models[2].parameters.normalize",
        "models[2].parameters.weight",
        "models[3].model",
        "models[4].model",
        "parameters.lamda",
        "2 tensors (model.embed_tokens.weight, lm_head.weight)",
    }
    with pytest.raises(ConfigError) as error:
        report.raise_for_problems("this merge")
    assert error.value.problems == report.problems
    assert all(str(problem) in str(error.value) for problem in report.problems)


def test_documents_of_a_multi_merge(models: Path) -> None:
    first = {**LINEAR, "name": "first", "models": entries(models, "a", "b")}
    second = {**LINEAR, "models": [{"model": "first"}, *entries(models, "c")]}
    text = yaml.safe_dump_all([first, second])
    (name, one), (last, two) = check_source(text, MergeOptions())
    assert (name, last) == ("first", None)
    assert one.problems == () and one.estimate is not None
    assert two.problems == () and two.estimate is None
    assert "another document" in " ".join(two.notes)

    circle = {**first, "models": [{"model": "second"}]}
    text = yaml.safe_dump_all([circle, {**second, "name": "second"}, {**second, "name": "second"}])
    reports = [report for _, report in check_source(text, MergeOptions())]
    assert "depends on itself" in at(reports[0], "models").found
    assert "again" in at(reports[2], "name").found


def test_weight_files(models: Path, tmp_path: Path) -> None:
    files = {name: models / name / "model.safetensors" for name in ("a", "b", "large_vocab")}
    document = {**LINEAR, "models": [{"model": str(files["a"])}, {"model": str(files["b"])}]}
    report = run(document)
    assert report.problems == () and report.estimate is not None
    assert report.estimate.tensors == 21
    report = run(
        {
            "merge_method": "lineer",
            "models": [
                {"model": str(files["a"]), "slices": []},
                {"model": str(files["large_vocab"])},
                {"model": str(tmp_path / "nowhere.safetensors")},
            ],
        }
    )
    assert at(report, "merge_method").remedy == "Write `linear`."
    assert "unknown key" in at(report, "models[0].slices").found
    assert "[72, 16]" in at(report, "2 tensors (lm_head.weight, model.embed_tokens.weight)").found
    assert "does not exist" in at(report, "models[2]").found


def test_weight_files_with_different_tensors(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2), "y": torch.zeros(2)}, tmp_path / "a.safetensors")
    torch.save({"x": torch.zeros(2)}, tmp_path / "b.bin")
    config = RawPyTorchMergeConfig.model_validate(
        {
            "merge_method": "ties",
            "base_model": str(tmp_path / "b.bin"),
            "models": [{"model": str(tmp_path / "a.safetensors")}],
            "parameters": {"weight": 1},
        }
    )
    options = MergeOptions()
    refused = check_flat(config, options)
    assert "b.bin with a pickle" in at(refused, "base_model").found
    with pickles.allowed(True):
        report = check_flat(config, options)
        common = check_flat(config, options, intersection=True)
        everything = check_flat(config, options, union=True)
    assert the(report).where == "y" and "b.bin" in the(report).found
    assert any("pickle" in note for note in report.notes)
    assert common.problems == () and common.estimate is not None and common.estimate.tensors == 1
    assert "y" in " ".join(common.notes)
    # Without its base, ties cannot merge y.
    assert "Base input is not present" in the(everything).found
