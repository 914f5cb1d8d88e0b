"""Merges that are planned by the names in the files: layers, heads, parts of a model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import mergekit_ext
from mergekit_ext.errors import MergeWarning, NonFiniteError
from tests import models as small
from tests.host.small import SMALL, checked, merging, tuned
from tests.reference import nan as reference

_VIT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
_IMAGE = {"image_size": 16, "patch_size": 8}

_DEEPSEEK = {
    **SMALL,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llm" / "nan_vlm.yml"


def vit(kind=ViTForImageClassification, **changes):
    torch.manual_seed(0)
    return kind(ViTConfig(**{**_VIT, **_IMAGE, "num_hidden_layers": 4, **changes}))


def llava():
    vision = {**_VIT, **_IMAGE, "model_type": "clip_vision_model", "num_hidden_layers": 2}
    text = {**SMALL, "model_type": "llama", "pad_token_id": 0}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={**vision, "projection_dim": 16}, text_config=text, image_token_index=63
        )
    )


def saved(folder, name, model, seed=0):
    tuned(copy.deepcopy(model), seed).save_pretrained(folder / name)
    return folder / name


def merge(document, out):
    """Check and merge; return the tensors and the configuration of the output."""
    report = checked(document)
    assert not report.problems, list(map(str, report.problems))
    config = MergeConfiguration.model_validate(document)
    mergekit_ext.merge(config, out, MergeOptions(quiet=True))
    return small.state(out), json.loads((out / "config.json").read_text())


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """A base and two fine-tunes, with heads of three labels; one more with five, and a body."""
    folder = tmp_path_factory.mktemp("vits")
    for seed, name in enumerate(("base", "one", "two")):
        saved(folder, name, vit(num_labels=3), seed)
    saved(folder, "five", vit(num_labels=5), 3)
    saved(folder, "body", vit(ViTModel), 0)
    return folder


def test_slices_and_gradients_follow_the_layers_in_the_names(vits, tmp_path):
    one, two = vits / "one", vits / "two"

    def piece(first, last):
        return {"sources": [{"model": str(m), "layer_range": [first, last]} for m in (one, two)]}

    document = {"merge_method": "linear", "slices": [piece(0, 1), piece(2, 4)], "dtype": "float32"}
    weight = [{"filter": "intermediate", "value": [0.0, 1.0]}, {"value": 0.25}]
    document["slices"][1]["sources"][0]["parameters"] = {"weight": weight}
    document["parameters"] = {"weight": 0.75}
    found, config = merge(document, tmp_path / "out")
    assert config["num_hidden_layers"] == 3
    _, loading = AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading.values())
    mine, other = small.state(one), small.state(two)
    assert found.keys() == {name for name in mine if ".layer.3." not in name}
    for target, source, t in ((0, 0, None), (1, 2, 0.0), (2, 3, 1.0)):
        for end, w in (("intermediate.dense.weight", t), ("layernorm_before.bias", 0.25)):
            stem = f"vit.encoder.layer.{{}}.{end}"
            share = 0.5 if t is None else w / (w + 0.75)
            a, b = (s[stem.format(source)].double() for s in (mine, other))
            wanted = share * a + (1 - share) * b
            torch.testing.assert_close(found[stem.format(target)].double(), wanted)


def test_no_tokenizer_is_looked_for_where_there_is_none(vits, tmp_path, caplog):
    merge(merging(vits / "base", vits / "one"), tmp_path / "out")
    assert "ERROR" not in {record.levelname for record in caplog.records}


def test_heads_that_differ_are_the_bases_and_the_report_says_so(vits, tmp_path):
    document = merging(vits / "base", vits / "one", vits / "five")
    warnings = " ".join(checked(document).warnings)
    assert f"{vits / 'base'}'s classifier.bias, classifier.weight" in warnings
    with pytest.warns(MergeWarning, match="`heads:` changes it"):
        found, config = merge(document, tmp_path / "out")
    states = [small.state(vits / name) for name in ("base", "one", "five")]
    assert found["classifier.weight"].equal(states[0]["classifier.weight"])
    assert len(config["id2label"]) == 3
    body = [{n: t for n, t in s.items() if "classifier" not in n} for s in states]
    for name, tensor in reference.merge(body[1:], body[0]).items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-6)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    copied = report["tensors"]["classifier.weight"]
    assert copied == {"copied_from": str(vits / "base")}
    assert "| `classifier.*` | 2 | base |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["five", "body"])
def test_the_output_has_the_head_and_the_class_that_heads_names(vits, tmp_path, name):
    document = merging(vits / "body", vits / "one", vits / "five")
    document["parameters"]["heads"] = str(vits / name)
    found, config = merge(document, tmp_path / "out")
    given = small.state(vits / name)
    assert found.keys() == given.keys()
    assert (
        config["architectures"]
        == json.loads((vits / name / "config.json").read_text())["architectures"]
    )
    heads = [key for key in given if key.startswith("classifier")]
    assert all(found[key].equal(given[key]) for key in heads)
    key = "encoder.layer.0.output.dense.weight"
    states = [
        {key: small.state(vits / model)[prefix + key]}
        for model, prefix in (("body", ""), ("one", "vit."), ("five", "vit."))
    ]
    prefix = "vit." if heads else ""
    wanted = reference.merge(states[1:], states[0])[key]
    torch.testing.assert_close(found[prefix + key].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_head_that_no_rule_decides_is_refused_with_the_choice(vits):
    (problem,) = checked(merging(vits / "body", vits / "one", vits / "two")).problems
    assert "classifier.bias, classifier.weight" in problem.found
    assert (
        f"heads: {vits / 'one'}" in problem.remedy and f"heads: {vits / 'body'}" in problem.remedy
    )


@pytest.fixture(scope="module")
def llavas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llavas")
    return [saved(folder, name, llava(), seed) for seed, name in enumerate(("base", "one", "two"))]


@pytest.mark.parametrize(
    "parameters",
    [
        yaml.safe_load(EXAMPLE.read_text())["parameters"],
        {"exclude": ["vision_tower.*", "multi_modal_projector.*"]},
    ],
)
def test_the_language_model_is_merged_and_the_vision_tower_kept(llavas, tmp_path, parameters):
    base, *models = llavas
    others = base if "include" in parameters else models[1]
    given = {**parameters, "others": str(others)}
    found, _ = merge(merging(base, *models, parameters=given), tmp_path / "out")
    start, *states = map(small.state, llavas)
    kept = small.state(others)
    language = {name for name in start if name.startswith("language_model.")}
    assert found.keys() == start.keys() and language < found.keys()
    wanted = reference.merge(states, start)
    for name, tensor in found.items():
        if name in language:
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
        else:
            assert tensor.equal(kept[name]), name
    _, loading = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading.values())


def test_a_stack_is_a_module_by_its_name(llavas, tmp_path):
    _, one, two = llavas
    both = [{"model": str(model)} for model in (one, two)]
    last = {"sources": [{**model, "layer_range": [1, 2]} for model in both]}
    stacks = ("default", "vision_tower.encoder.layers", "language_model.model.layers")
    document = {
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
        "modules": {
            name: {"slices": [last]} if name.startswith("lang") else {"models": both}
            for name in stacks
        },
    }
    found, config = merge(document, tmp_path / "out")
    assert config["text_config"]["num_hidden_layers"] == 1
    states = [small.state(model) for model in (one, two)]
    start = "language_model.model.layers.{}.mlp.up_proj.weight"
    wanted = sum(state[start.format(1)] for state in states) / 2
    torch.testing.assert_close(found[start.format(0)], wanted)
    assert start.format(1) not in found
    _, loading = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading.values())


def test_every_mistake_in_what_decides_is_named(llavas):
    base, *models = llavas
    given = {"heads": f"{base}x", "others": 3, "include": "vision*", "exclude": ["langage.*", 1]}
    found = {p.where: p for p in checked(merging(base, *models, parameters=given)).problems}
    assert found["parameters.heads"].remedy == f"Write `{base}`."
    assert str(models[0]) in found["parameters.others"].expected
    assert {"parameters.heads", "parameters.others", "parameters.exclude"} == found.keys()


@pytest.mark.parametrize("method", ["nan", "decompose"])
def test_a_merge_of_nothing_is_refused(llavas, method):
    base, *models = llavas
    document = {**merging(base, *models, parameters={"exclude": "*"}), "merge_method": method}
    found = {p.where: p for p in mergekit_ext.check(yaml.safe_dump(document)).problems}
    assert found["parameters.exclude"].expected == "one tensor at least that is merged"


def test_coefficients_of_experts_need_experts(llavas):
    base, *models = llavas
    given = {"granularity": "expert"}
    document = merging(base, *models, parameters=given)
    (note,) = (n for n in checked({**document, "merge_method": "nan"}).notes if "expert" in n)
    assert note.startswith("`granularity: expert` does what `tensor` does")


@pytest.mark.parametrize(
    ("where", "name", "remedy"),
    [
        ("parameters", "inclde", "Write `include`."),
        ("parameters", "others", "Add one of them, or take it out."),
        ("", "exclude", "Put `exclude:` under `parameters:`."),
        ("models[1].parameters", "heads", "Move `heads:` to the `parameters:` of the top level."),
    ],
)
def test_what_decides_in_another_place_or_alone(llavas, where, name, remedy):
    base, *models = llavas
    document = merging(base, *models, parameters={})
    level = {"": document, "parameters": document["parameters"]}.get(where)
    level = document["models"][1].setdefault("parameters", {}) if level is None else level
    level[name] = str(models[0])
    (problem,) = mergekit_ext.check(yaml.safe_dump(document)).problems
    assert problem.where == (f"{where}.{name}" if where else name)
    assert problem.remedy == remedy


def test_what_is_copied_is_finite(llavas, tmp_path):
    base, *models = llavas
    broken = tmp_path / "broken"
    shutil.copytree(models[0], broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.startswith("vision_tower"))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    given = {"include": "language_model.*", "others": str(broken)}
    with pytest.raises(NonFiniteError, match=name):
        merge(merging(base, broken, models[1], parameters=given), tmp_path / "out")


def experts(name, model, folder, stacked):
    """Save a model, its experts in stacks or one by one."""
    model.save_pretrained(folder / name)
    if stacked:
        state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(state, folder / name / "model.safetensors", {"format": "pt"})
    return folder / name


@pytest.mark.parametrize("stacked", [(False, False, False), (False, True, False)])
def test_each_expert_has_coefficients_however_experts_are_stored(tmp_path, stacked):
    torch.manual_seed(0)
    start = DeepseekV3ForCausalLM(DeepseekV3Config(**_DEEPSEEK))
    members = [tuned(copy.deepcopy(start), seed) for seed in range(3)]
    base, *models = (
        experts(name, model, tmp_path, form)
        for name, model, form in zip(("base", "one", "two"), members, stacked, strict=True)
    )
    document = merging(base, *models, parameters={"granularity": "expert"})
    notes = " ".join(checked(document).notes)
    assert "model.layers.1.mlp.gate.weight" in notes and "routers" in notes
    merge(document, tmp_path / "out")
    found = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    states = [model.state_dict() for model in members]
    stacks = [name for name in states[0] if "mlp.experts." in name]
    assert len(stacks) == 2
    for name in stacks:
        for expert in range(4):
            own = [{name: state[name][expert]} for state in states]
            wanted = reference.merge(own[1:], own[0])[name]
            torch.testing.assert_close(found[name][expert].double(), wanted, rtol=1e-5, atol=1e-6)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(report["tensors"][stacks[0]]["experts"]) == 4
