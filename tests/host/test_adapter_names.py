"""Adapters on checkpoints whose tensors are called otherwise than in the class or the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from mergekit_ext.errors import ConfigError
from mergekit_ext.host.checks.merge import check_source
from tests import models as small
from tests.host.adapters import check, merged_with_peft, opened, saved_adapter, saved_base

PLAIN = LoraConfig(r=2, target_modules=["q_proj"])


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava():
    text, image = LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**IMAGE)
    config = transformers.LlavaConfig(text_config=text, vision_config=image)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    image = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    tokens = {"image_token_id": 60, "video_token_id": 61}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": rope}, vision_config=image, **tokens
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def gemma3():
    tokens = {"image_token_index": 60, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8}, vision_config=IMAGE, **tokens
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE))


def whisper():
    sizes = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=32,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        **sizes,
    )
    return transformers.WhisperForConditionalGeneration(config)


def t5_of_version_1():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


# What modules were called before (transformers 4.51 and, of ViT, 4).
OLD_NAMES = {
    "llava": (llava, ["q_proj", "linear_1"], [("model.language_model", "language_model.model")]),
    "qwen2_vl": (
        qwen2_vl,
        ["q_proj", "qkv"],
        [("model.language_model", "model"), ("model.visual", "visual")],
    ),
    "gemma3": (gemma3, ["q_proj", "fc1"], [("model.language_model", "language_model.model")]),
    "vit": (
        vit,
        ["q_proj", "fc1"],
        [
            (".layers.", ".encoder.layer."),
            ("attention.q_proj", "attention.attention.query"),
            ("mlp.fc1", "intermediate.dense"),
        ],
    ),
}
OTHER_TOWERS = [
    ("model.multi_modal_projector", "multi_modal_projector"),
    ("model.vision_tower", "vision_tower"),
]


def under_old_names(adapter: Path, folder: Path, changes: list[tuple[str, str]]) -> Path:
    """A copy of an adapter as an older version of transformers had it saved."""

    def old(name: str) -> str:
        for new, before in (*changes, *OTHER_TOWERS):
            name = name.replace(new, before)
        return name

    folder.mkdir()
    start = "base_model.model."
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {start + old(name.removeprefix(start)): t for name, t in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = json.loads((adapter / "adapter_config.json").read_text())
    # Of one that was saved then, the targets are of then, too.
    modules = {name.removeprefix(start).rpartition(".lora_")[0] for name in renamed}
    fields["target_modules"] = sorted({module.rpartition(".")[2] for module in modules})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("original", [True, False], ids=["old-base", "new-base"])
@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_of_two_versions_of_a_class(name, original, tmp_path):
    """Base and adapter under the old or the new names: always the merge of PEFT."""
    make, targets, changes = OLD_NAMES[name]
    torch.manual_seed(0)
    model, base = make(), tmp_path / "base"
    model.save_pretrained(base, save_original_format=original)
    lora = LoraConfig(r=2, target_modules=targets)
    new = saved_adapter(base, tmp_path / "new", lora, 1, type(model))
    old = under_old_names(new, tmp_path / "old", changes)
    whole = merged_with_peft(base, new, tmp_path / "whole", type(model))
    wanted = type(model).from_pretrained(whole).state_dict()
    for adapter in (new, old):
        loader = opened(f"{base}+{adapter}")
        out = tmp_path / f"out-{adapter.name}"
        shutil.copytree(base, out)
        tensors = {key: loader.get_tensor(key) for key in loader.index.tensor_paths}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        found = type(model).from_pretrained(out).state_dict()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
    key = next(key for key in wanted if key.endswith(f"{targets[0]}.weight"))
    assert not torch.equal(wanted[key], model.state_dict()[key])


@pytest.mark.parametrize(
    ("make", "method"),
    [
        *((make, "linear") for make in (llava, qwen2_vl, gemma3, vit, whisper, t5_of_version_1)),
        *((make, "nan") for make in (llava, whisper)),
    ],
)
def test_merged_as_peft_does_or_refused_by_check_and_merge_alike(make, method, tmp_path):
    torch.manual_seed(0)
    model, base = make(), tmp_path / "base"
    model.save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=r".*\.(q_proj|q|v_proj)")
    adapter = saved_adapter(base, tmp_path / "adapter", lora, 1, type(model))
    content = small.config(
        method,
        [Path(f"{base}+{adapter}")],
        base if method == "nan" else None,
        {"weight": 1.0} if method == "linear" else None,
    )
    text = yaml.safe_dump(content)
    ((_, report),) = check_source(text, MergeOptions())
    parsed = MergeConfiguration.model_validate(yaml.safe_load(text))
    out = tmp_path / "out"
    if report.problems:
        with pytest.raises(ConfigError) as refused:
            run_merge(parsed, str(out), MergeOptions(quiet=True), text)
        assert refused.value.problems == report.problems
        assert all(problem.remedy for problem in report.problems)
        assert not out.exists()
        return
    run_merge(parsed, str(out), MergeOptions(quiet=True), text)
    whole = merged_with_peft(base, adapter, tmp_path / "whole", type(model))
    found, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    wanted = type(model).from_pretrained(whole).state_dict()
    for key, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-5, msg=key)


def test_square_weights_of_both_orientations(tmp_path):
    """GPT-2: PEFT writes the flag of the head, which is adapted last, and c_proj is a Conv1D."""
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, tie_word_embeddings=False
    )
    kind = transformers.GPT2LMHeadModel
    base = saved_base(tmp_path / "base", lambda: kind(config))
    lora = LoraConfig(r=2, target_modules=["attn.c_proj", "lm_head"])
    adapter = saved_adapter(base, tmp_path / "adapter", lora, 1, kind)
    wanted = small.state(merged_with_peft(base, adapter, tmp_path / "whole", kind))
    for flag in (True, False):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": flag}))
        loader = opened(f"{base}+{adapter}")
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
    assert problem.remedy.startswith("With MERGEKIT_EXT_ADAPTERS=0")


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
