"""LoRAs of diffusers: files of its own pipelines and of kohya, merged, and loaded by diffusers."""

from __future__ import annotations

import builtins
import copy
import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import peft_merge
from mergekit_ext.errors import ConfigError

diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya  # noqa: E402

FILE = "pytorch_lora_weights.safetensors"
_UNET = ["to_q", "to_out.0", "conv1", "proj_in"]
_TEXT = ["q_proj", "out_proj", "fc1"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def text_encoder():
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
            max_position_embeddings=8,
            projection_dim=16,
        )
    )


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


class Pipeline(StableDiffusionLoraLoaderMixin):
    """The two components of Stable Diffusion that have LoRAs."""

    hf_device_map = None

    def __init__(self):
        self.unet, self.text_encoder = unet(), text_encoder()
        self.components = {"unet": self.unet, "text_encoder": self.text_encoder}


def weights(model):
    """What a model computes with: the weights of its layers, with what its LoRAs add."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            change = sum(module.get_delta_weight(a) for a in module.active_adapters)
            found[name] = module.base_layer.weight.detach().double() + change.detach().double()
    return found


def trained(model, targets, seed, rank=4, alpha=2, **settings):
    """Add a LoRA to a component; return its tensors under PEFT's names, and its configuration."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **settings)
    model.add_adapter(config, "default")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return get_peft_model_state_dict(model, adapter_name="default"), config


def of_stable_diffusion(folder, seed, metadata=True, **settings):
    """Save a LoRA of both components with the pipeline's own function; return the components."""
    made = Pipeline()
    layers, configs = {}, {}
    for name, targets in (("unet", _UNET), ("text_encoder", _TEXT)):
        tensors, config = trained(getattr(made, name), targets, seed, **settings)
        # Of a UNet diffusers loads one kind of names at a time.
        renamed = tensors if name == "unet" else convert_state_dict_to_diffusers(tensors)
        layers[f"{name}_lora_layers"] = renamed
        configs[f"{name}_lora_adapter_metadata"] = config.to_dict()
    Pipeline.save_lora_weights(folder, **layers, **(configs if metadata else {}))
    return made.components


def merged(inputs, out, method="linear", **options):
    peft_merge.merge_adapters([*map(str, inputs)], method, **options).save(out)
    assert {path.name for path in out.iterdir()} >= {FILE, "README.md"}
    assert not (out / "adapter_config.json").exists()
    return out


def averaged(base, models):
    """The weights of the mean of changes; a layer that a model does not adapt is not changed."""
    start = {
        n: m.weight.detach().double()
        for n, m in base.named_modules()
        if getattr(m, "weight", None) is not None
    }
    found = [weights(model) for model in models]
    return {
        name: sum(each.get(name, start[name]) for each in found) / len(found)
        for name in {name for each in found for name in each}
    }


def compare(model, wanted):
    found = weights(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def load(out):
    made = Pipeline()
    made.load_lora_weights(str(out))
    return made


@pytest.mark.parametrize("patterns", [False, True])
def test_both_components_of_stable_diffusion(tmp_path, patterns):
    models = [
        of_stable_diffusion(tmp_path / "a", 1, rank=4, alpha=2),
        of_stable_diffusion(tmp_path / "b", 2, rank=2, alpha=6, use_rslora=True),
    ]
    out = merged([tmp_path / "a", tmp_path / "b"], tmp_path / "out", patterns=patterns)
    found = load(out)
    for name, start in Pipeline().components.items():
        compare(found.components[name], averaged(start, [m[name] for m in models]))
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "diffusers"
    assert 'pipeline.load_lora_weights("merged")' in card.text


def test_without_alphas_the_rank_is_the_alpha(tmp_path):
    for seed, name in enumerate("ab", 1):
        of_stable_diffusion(tmp_path / name, seed, metadata=False, rank=4, alpha=4)
    out = merged([tmp_path / "a", tmp_path / "b" / FILE], tmp_path / "out")
    models = [load(tmp_path / name) for name in "ab"]
    compare(load(out).unet, averaged(unet(), [model.unet for model in models]))


def kohya(folder, seed):
    """Write one file in the form of kohya's trainer, with alphas of its own."""
    made = Pipeline()
    state = {}
    for name, targets in (("unet", _UNET[:2]), ("text_encoder", _TEXT)):
        tensors, _ = trained(getattr(made, name), targets, seed, rank=4, alpha=4)
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    state = convert_state_dict_to_kohya(state)
    alphas = {key: torch.tensor(3.0 if "unet" in key else 1.0) for key in state if "alpha" in key}
    folder.mkdir()
    state = {key.replace("lora_te1_", "lora_te_"): t for key, t in {**state, **alphas}.items()}
    save_file({k: t.contiguous() for k, t in state.items()}, folder / f"style{seed}.safetensors")
    return folder / f"style{seed}.safetensors"


def test_kohyas_files_and_network_alphas(tmp_path):
    files = [kohya(tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    models = [load(file) for file in files]
    out = merged(files, tmp_path / "out", weights=[1, 1])
    found = load(out)
    for name in ("unet", "text_encoder"):
        start = Pipeline().components[name]
        compare(found.components[name], averaged(start, [m.components[name] for m in models]))


def test_a_transformer_beside_one_that_adapts_less(tmp_path):
    models = []
    for seed, targets in enumerate((["to_q", "proj_out"], ["to_q"]), 1):
        model = flux()
        tensors, config = trained(model, targets, seed, rank=2, alpha=8)
        FluxLoraLoaderMixin.save_lora_weights(
            tmp_path / str(seed), tensors, transformer_lora_adapter_metadata=config.to_dict()
        )
        models.append(model)
    out = merged([tmp_path / "1", tmp_path / "2"], tmp_path / "out", "ties", rank="lossless")
    model = flux()
    model.load_lora_adapter(str(out / FILE), prefix="transformer")
    assert weights(model).keys() == weights(models[0]).keys()
    out = merged([tmp_path / "1", tmp_path / "2"], tmp_path / "mean")
    model = flux()
    model.load_lora_adapter(load_file(out / FILE), prefix="transformer")
    compare(model, averaged(flux(), models))


def refused(*inputs, **options):
    with pytest.raises(ConfigError) as caught:
        peft_merge.merge_adapters([*map(str, inputs)], options.pop("method", "linear"), **options)
    return str(caught.value)


def test_what_is_no_lora_of_diffusers(tmp_path, monkeypatch):
    model = text_encoder()
    of_stable_diffusion(tmp_path / "lora", 1)
    tensors, config = trained(copy.deepcopy(model), _TEXT, 1)
    (tmp_path / "peft").mkdir()
    named = {f"base_model.model.{key}": t.contiguous() for key, t in tensors.items()}
    save_file(named, tmp_path / "peft" / "adapter_model.safetensors")
    fields = json.dumps(config.to_dict(), default=sorted)
    (tmp_path / "peft" / "adapter_config.json").write_text(fields)
    text = refused(tmp_path / "lora", tmp_path / "peft")
    assert "lora: LoRA of diffusers, peft: LoRA" in text and "separately" in text
    assert text.startswith("1 problem ")
    others = {
        "odd": ("diffusion_model.layers.0.lora_A.weight", "save_lora_weights"),
        "dora": ("unet.x.lora_magnitude_vector", "no other kind"),
    }
    for name, (key, expected) in others.items():
        save_file({key: torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
        text = refused(tmp_path / f"{name}.safetensors")
        assert key in text and expected in text
    options = {"method": "flexmerge", "parameters": {"target_size": 1}}
    assert "LoRAs of diffusers" in refused(tmp_path / "lora", tmp_path / "lora", **options)
    stock = builtins.__import__

    def without(name, *rest):
        if name.startswith("diffusers"):
            raise ImportError(name)
        return stock(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'mergekit-ext[diffusers]'" in refused(tmp_path / "lora")
