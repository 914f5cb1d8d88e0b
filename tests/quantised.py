"""Small quantised checkpoints, as the libraries that own the formats write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.reference import quantised as reference

Change = Callable[[str, Tensor], dict[str, Tensor]]
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def llama(seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).bfloat16()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def rewrite(folder: Path, change: Change, of: str = "proj", **settings: Any) -> None:
    """Store each weight whose module's name ends in `of` as `change` makes it, with `settings`."""
    file, path = folder / "model.safetensors", folder / "config.json"
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        module = name.removesuffix(".weight")
        kept = {name: tensor}
        stored |= change(module, tensor.float()) if module.endswith(of) else kept
    save_file(stored, file, {"format": "pt"})
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "quantization_config": settings}))


def fp8(folder: Path, block: tuple[int, int] | None = None) -> None:
    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        height, width = block or weight.shape
        rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
        whole = torch.zeros(rows * height, columns * width)
        whole[: weight.shape[0], : weight.shape[1]] = weight
        cut = whole.view(rows, height, columns, width)
        scales = cut.abs().amax((1, 3)) / 448
        codes = (cut / scales[:, None, :, None]).view_as(whole)
        codes = codes[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous()
        name = f"{module}.weight"
        return {name: codes, f"{name}_scale_inv": scales if block else scales.view(())}

    rewrite(folder, change, quant_method="fp8", weight_block_size=block and list(block))


def mxfp4(folder: Path) -> None:
    """Save a GptOss whose experts are random blocks."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, **CONFIG}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).bfloat16()
    model.save_pretrained(folder)

    def change(name: str, weight: Tensor) -> dict[str, Tensor]:
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16))
        scales = torch.randint(118, 123, blocks.shape[:-1])
        return {f"{name}_blocks": blocks.byte(), f"{name}_scales": scales.byte()}

    rewrite(folder, change, "experts.down_proj", quant_method="mxfp4")
    rewrite(folder, change, "experts.gate_up_proj", quant_method="mxfp4")


def compressed(folder: Path, form: str, **arguments: Any) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    groups = {"group_0": scheme}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            group = weights.group_size or module.weight.shape[1]
            grouped = module.weight.data.float().unflatten(1, (-1, group))
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), weights)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def bitsandbytes(folder: Path, **settings: Any) -> None:
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(folder)


# What is packed number by number, which takes long: a matrix with fewer rows than columns.
_ONE = "k_proj"


def _grouped(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (in, out), zero points and scales (groups, out)."""
    grouped = weight.T.unflatten(0, (-1, group))
    least, most = grouped.amin(1), grouped.amax(1)
    scales = ((most - least) / (2**bits - 1)).half()
    zeros = (-least / scales).round().clamp(0, 2**bits - 1).int()
    codes = (grouped / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1).int()
    return codes.flatten(0, 1), zeros, scales


def gptq(folder: Path, bits: int, form: str, ordered: bool) -> dict[str, Tensor]:
    """Quantise; returns the weights in float64."""
    exact: dict[str, Tensor] = {}

    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        groups = torch.arange(weight.shape[1]) // 32
        if ordered:  # `desc_act`: inputs of a group are not beside each other
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        codes, zeros, scales = _grouped(weight[:, groups.argsort()], bits, 32)
        codes = codes[groups.argsort().argsort()]
        exact[f"{module}.weight"] = reference.from_groups(codes, zeros, scales, groups)
        stored = (zeros - int(form == "gptq")) % 2**bits
        return {
            f"{module}.qweight": reference.packed(codes, bits),
            f"{module}.qzeros": reference.packed(stored.T, bits).T.contiguous(),
            f"{module}.scales": scales,
            **({f"{module}.g_idx": groups.int()} if ordered else {}),
        }

    settings = {"bits": bits, "group_size": 32, "desc_act": ordered, "checkpoint_format": form}
    rewrite(folder, change, _ONE, quant_method="gptq", **settings)
    return exact


def awq(folder: Path) -> dict[str, Tensor]:
    exact: dict[str, Tensor] = {}

    def change(module: str, weight: Tensor) -> dict[str, Tensor]:
        codes, zeros, scales = _grouped(weight, 4, 32)
        groups = torch.arange(weight.shape[1]) // 32
        exact[f"{module}.weight"] = reference.from_groups(codes, zeros, scales, groups)
        return {
            f"{module}.qweight": reference.packed_as_awq(codes),
            f"{module}.qzeros": reference.packed_as_awq(zeros),
            f"{module}.scales": scales,
        }

    rewrite(folder, change, _ONE, quant_method="awq", bits=4, group_size=32, version="gemm")
    return exact


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_CHANNEL = {"num_bits": 8, "strategy": "channel"}
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# Those that transformers dequantises on a CPU.
KINDS: dict[str, Callable[[Path], None]] = {
    "fp8-tensor": fp8,
    "fp8-block": lambda folder: fp8(folder, (32, 32)),
    "fp8-channel": lambda folder: compressed(folder, "float-quantized", type="float", **_CHANNEL),
    "int8": lambda folder: compressed(folder, "int-quantized", type="int", **_CHANNEL),
    "int4": lambda folder: compressed(folder, "pack-quantized", **_INT4),
    "int4-zero": lambda folder: compressed(folder, "pack-quantized", **_INT4, symmetric=False),
    "bitsandbytes-int8": lambda folder: bitsandbytes(folder, load_in_8bit=True),
    "bitsandbytes-fp4": lambda folder: bitsandbytes(folder, load_in_4bit=True),
    "bitsandbytes-nf4": lambda folder: bitsandbytes(folder, **_NF4),
}


def made(folder: Path, kind: str, seed: int = 0) -> Path:
    llama(seed).save_pretrained(folder)
    KINDS[kind](folder)
    return folder


_OWN = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}


def dequantised(folder: Path, out: Path) -> Path:
    """Save the plain model that transformers itself makes of a quantised one."""
    config = transformers.AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    if settings["quant_method"] == "bitsandbytes":
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").dequantize()
    else:
        own = getattr(transformers, _OWN[settings["quant_method"]])(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=own)
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    return out
