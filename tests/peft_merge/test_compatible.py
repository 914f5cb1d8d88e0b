"""Which adapters can be merged with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from peft_merge.adapter import Adapter
from peft_merge.io.compatible import DifferentBasesWarning, compatible, different_bases
from peft_merge.io.merged import lora_configuration
from peft_merge.io.read import load_adapter

Load = Callable[..., Adapter]


@pytest.fixture
def load(adapter_folder):
    def make(kind, seed=1, name=None, **config):
        adapter = load_adapter(adapter_folder(kind, seed), name=name or f"{kind}-{seed}")
        return replace(adapter, config={**adapter.config, **config})

    return make


@pytest.mark.parametrize(
    "kinds",
    [
        ("plain",),
        ("plain", "patterns", "rslora", "regex", "gaussian"),
        ("lora_bias", "bias_all", "modules_to_save"),
        ("parameters", "parameters"),
        ("ia3", "ia3_attention"),
    ],
    ids="+".join,
)
def test_different_ranks_and_modules_are_fine(kinds, load):
    assert compatible([load(kind, seed) for seed, kind in enumerate(kinds)]) == []


@pytest.mark.parametrize(
    ("kinds", "where"),
    [
        (("plain", "ia3"), "adapters"),
        (("plain", "replicated"), "layer_replication"),
        (("parameters", "nested_parameters"), "target_parameters"),
        (("embedding", "saved_embedding"), "model.embed_tokens"),
        (("lora_bias", "embedding"), "model.embed_tokens"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(kinds, where, load):
    problems = compatible([load(kind) for kind in kinds])
    assert where in {problem.where for problem in problems}
    assert all(problem.remedy for problem in problems)


def test_all_problems_come_at_once(load):
    one, other = load("plain"), load("plain", 2)
    module, info = next(iter(other.infos.items()))
    other = replace(
        other,
        infos={**other.infos, module: replace(info, rows=3)},
        config={**other.config, "layer_replication": [[0, 2]]},
    )
    assert [problem.where for problem in compatible([one, other])] == ["layer_replication", module]


def test_a_module_that_is_feedforward_in_one_adapter_only(load):
    one, other = load("ia3"), load("ia3", 2)
    module = "model.layers.0.self_attn.k_proj"
    changed = replace(other.infos[module], feedforward=True)
    other = replace(other, infos={**other.infos, module: changed})
    (problem,) = compatible([one, other])
    assert "feedforward" in problem.found and problem.where == module


def test_saved_embeddings_must_agree_about_tying(load):
    one = load("tied_saved")
    other = replace(one, name="b", config={**one.config, "ensure_weight_tying": False})
    assert [problem.where for problem in compatible([one, other])] == ["ensure_weight_tying"]


def test_names_of_bases_may_differ_with_a_warning(load):
    one = load("plain", base_model_name_or_path="a/base")
    same = load("plain", 2, base_model_name_or_path="a/base/")
    other = load("plain", 3, base_model_name_or_path="b/base")
    silent = load("plain", 4, base_model_name_or_path=None)
    assert different_bases([one, same, silent]) is None
    warning = different_bases([one, other])
    assert isinstance(warning, DifferentBasesWarning) and "a/base (plain-1)" in str(warning)
    assert compatible([one, other]) == []
    assert different_bases([one], "c/base") is None and different_bases([silent], "a") is None
    warning = different_bases([one], "a/other")
    assert "a/base (plain-1), a/other (base_model)" in str(warning)


def test_fan_in_fan_out_is_of_linear_layers_only(load):
    one, turned = load("plain"), load("plain", 2, fan_in_fan_out=True)
    assert compatible([one, turned]) == []
    config = lora_configuration(one.infos, [one, turned], ())
    assert config["fan_in_fan_out"] is True
    embedding = load("embedding", fan_in_fan_out=True)
    only = {m: info for m, info in embedding.infos.items() if info.layout == "embedding"}
    embedding = replace(embedding, infos=only)
    assert only and compatible([one, embedding]) == compatible([embedding, one]) == []
    config = lora_configuration(one.infos, [embedding, one], ())
    assert config["fan_in_fan_out"] is False


def test_different_target_parameters_are_the_only_reason(load):
    one = load("parameters")
    module, info = next((m, i) for m, i in one.infos.items() if i.layout == "parameter")
    config = {**one.config, "target_parameters": ["experts.other"]}
    other = replace(one, name="b", config=config)
    other = replace(other, infos={**one.infos, module: replace(info, rows=3)})
    assert [problem.where for problem in compatible([one, other])] == ["target_parameters"]
