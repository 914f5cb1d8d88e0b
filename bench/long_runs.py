"""Merges of many tensors, many models and many adapters, all of them tiny."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.scripts.run_yaml import main as run_yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peaks import Peaks, measured
from mergekit_ext.cli import main
from peft_merge.cli import main as adapters

_PER_LAYER = 9
_SIDE = 16


def cases(
    folder: Path, tensors: int, models: int, modules: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a command for each: into folders beside the inputs.

    Args:
        folder: exists; gets the inputs.
        tensors: of the merge of three models with many.
        models: of the merge of many, with two layers.
        modules: of the merge of eight adapters.
    """
    layers = max(1, tensors // _PER_LAYER)
    for what, inputs in (
        (f"{layers * _PER_LAYER + 3} tensors", _models(folder / "deep", layers, 3)),
        (f"{models} models", _models(folder / "wide", 2, models)),
    ):
        ties = {"merge_method": "nan_ties", "parameters": {"density": 0.5}}
        flex = {
            "merge_method": "flexmerge",
            "parameters": {"target_size": 1.5, "algorithm": "ties"},
        }
        for content in (ties, flex):
            name = f"{content['merge_method']}, {what}"
            models_of = [{"model": str(path)} for path in inputs[1:]]
            content |= {"base_model": str(inputs[0]), "models": models_of}
            yield name, _command(main, ["merge"], folder, name, content, "--no-copy-tokenizer")
    sources = _adapters(folder, modules, 8)
    for method in ("linear", "ties"):
        name = f"peft-merge {method}, {modules} modules x 8 adapters"
        content = {"merge_method": method, "models": [{"model": str(path)} for path in sources]}
        yield name, _command(adapters, [], folder, name, content)


def other_commands(folder: Path, side: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """`mergekit-yaml`, `sizes`, and solves of matrices with `side` rows."""
    small = [{"model": str(path)} for path in _models(folder / "small", 4, 3)]
    ties = {"merge_method": "nan_ties", "parameters": {"density": 0.5}}
    flex = {"merge_method": "flexmerge", "parameters": {"algorithm": "ties"}}
    for content in (ties, flex):
        content |= {"base_model": small[0]["model"], "models": small[1:]}
    yield "mergekit-yaml", _command(run_yaml, [], folder, "mergekit-yaml", ties)
    scored = ["--evaluate", f"{__name__}:score"]
    yield "sizes", _command(main, ["sizes"], folder, "sizes", flex, *scored)
    large = [{"model": str(path)} for path in _models(folder / "large", 1, 3, side)[1:]]
    lore = {"merge_method": "lore", "parameters": {"mu_relative": 0.1}, "models": large}
    name = f"lore, {side} rows"
    yield name, _command(main, ["merge"], folder, name, lore, "--no-copy-tokenizer")


def score(model: object, task: str) -> float:
    """Nothing of a model."""
    return 0.0


def peaks(folder: Path, tensors: int, models: int, modules: int) -> Iterator[tuple[str, Peaks]]:
    """What each of the `cases` holds."""
    for name, command in cases(folder, tensors, models, modules):
        yield name, measured(command)


def _command(
    command: Callable[..., Any],
    first: Sequence[str],
    folder: Path,
    name: str,
    content: dict[str, Any],
    *options: str,
) -> Callable[[], object]:
    file = folder / f"{name}.yml"
    file.write_text(yaml.safe_dump(content))
    return lambda: command([*first, str(file), str(folder / name), "--quiet", *options])


def _models(folder: Path, layers: int, count: int, side: int = _SIDE) -> list[Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=side,
        intermediate_size=side,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    found = []
    for index in range(count + 1):
        found.append(folder / f"m{index}")
        model.save_pretrained(found[-1])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return found


def _adapters(folder: Path, modules: int, count: int) -> list[Path]:
    found = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        place = folder / f"lora{index}"
        place.mkdir()
        tensors = {}
        for module in range(modules):
            name = f"base_model.model.model.layers.{module}.self_attn.q_proj"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, _SIDE, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(_SIDE, 4, generator=generator)
        save_file(tensors, place / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (place / "adapter_config.json").write_text(json.dumps(fields))
        found.append(place)
    return found
