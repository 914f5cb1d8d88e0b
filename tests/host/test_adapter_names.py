"""Adapters on checkpoints whose tensors are called otherwise than in the class or the table."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import LoraConfig
from transformers import LlamaConfig

from mergekit_ext.host.adapters.extension import config_beside
from tests import models as small
from tests.host.adapters import check, merged_with_peft, opened, saved_adapter, saved_base

PLAIN = LoraConfig(r=2, target_modules=["q_proj"])


def test_a_checkpoint_with_the_names_of_another_version(tmp_path):
    """Stored as `language_model.model...`, adapted as `model.language_model...`."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    small_text = LlamaConfig(**text, num_hidden_layers=2, num_attention_heads=4)
    image = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(text_config=small_text, vision_config=image)
    kind = transformers.LlavaForConditionalGeneration
    base = saved_base(tmp_path / "base", lambda: kind(config))
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    adapter = saved_adapter(base, tmp_path / "adapter", lora, 1, kind)
    wanted = small.state(merged_with_peft(base, adapter, tmp_path / "whole", kind))
    loader = opened(f"{base}+{adapter}")
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    assert name in small.state(base)
    assert not torch.equal(loader.get_tensor(name), small.state(base)[name])
    assert loader.index.tensor_paths.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(loader.get_tensor(name), tensor, rtol=1e-5, atol=1e-5)


def test_experts_that_transformers_stacks(tmp_path):
    """The file has one tensor for each expert: a change of the stack is not applied to it."""
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    kind = transformers.MixtralForCausalLM
    base = saved_base(tmp_path / "base", lambda: kind(config))
    attention = saved_adapter(base, tmp_path / "attention", PLAIN, 1, kind)
    assert check(f"{base}+{attention}").problems == ()
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    experts = saved_adapter(base, tmp_path / "experts", lora, 1, kind)
    (problem,) = check(f"{base}+{experts}").problems
    assert "expert by expert (model.layers.0." in problem.found
    assert problem.remedy.startswith("Set MERGEKIT_EXT_ADAPTERS=0")


def test_an_architecture_without_a_table(tmp_path):
    """mergekit takes the tensors' names; its own way refuses adapters there."""
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        word_embed_proj_dim=32,
    )
    kind = transformers.OPTForCausalLM
    base = saved_base(tmp_path / "base", lambda: kind(config))
    adapter = saved_adapter(base, tmp_path / "adapter", PLAIN, 1, kind)
    whole = merged_with_peft(base, adapter, tmp_path / "whole", kind)
    model = f"{base}+{adapter}"
    report = check(model)
    assert report.problems == ()
    assert any("no table" in note for note in report.notes)
    content = small.config("linear", [Path(model)], None, {"weight": 1.0})
    parsed = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(content)))
    run_merge(parsed, str(tmp_path / "out"), MergeOptions(quiet=True))
    found, wanted = small.state(tmp_path / "out"), small.state(whole)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_configuration_that_transformers_refuses_says_nothing_of_a_file(tmp_path):
    LlamaConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    assert config_beside(str(tmp_path / "model.safetensors")).hidden_size == 8
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "hidden_size": [8]}))
    assert config_beside(str(tmp_path / "model.safetensors")) is None
