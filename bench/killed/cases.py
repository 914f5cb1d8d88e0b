"""What is killed: small real models, and a merge of them by each method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import mergekit_ext
from peft_merge.merge import run_config
from tests import models as small

_WIDTH, _LAYERS, _RANK = 256, 8, 16
_SHARD = 2_000_000
_METHODS: Mapping[str, Mapping[str, Any]] = {
    "nan_ties": {"granularity": "model", "density": 0.3},
    "lore": {"mu_relative": 0.2, "max_iterations": 3},
    "flexmerge": {"target_size": 2.0, "algorithm": "ties"},
}
_ADAPTERS = "peft-merge"
NAMES = (*_METHODS, _ADAPTERS)


@dataclass(frozen=True)
class Case:
    """One merge.

    Attributes:
        name: of its method.
        config: its YAML file.
        earlier: a model that an output may be merged over.
        merge: merges into a folder, in this process.
        replaces: whether a folder that is not empty may be merged into.
        shared_out: whether several processes can do it.
        flags: of `mergekit-ext merge`.
    """

    name: str
    config: Path
    earlier: Path
    merge: Callable[[Path], None]
    replaces: bool = True
    shared_out: bool = True
    flags: Sequence[str] = ()


def make(folder: Path, names: Sequence[str]) -> list[Case]:
    """Save the models and the configurations of these methods."""
    base, tuned = small.family(folder / "models", _llama, amounts=(0.01, 0.02, 0.03, 0.04))
    made = []
    for name in names:
        path = folder / f"{name}.yml"
        if name == _ADAPTERS:
            _adapters(folder / "adapters")
            content = _adapter_config(folder / "adapters")
            path.write_text(yaml.safe_dump(content))
            made.append(Case(name, path, base, _merges_adapters(path), False, False))
            continue
        content = small.config(name, tuned, None if name == "lore" else base, _METHODS[name])
        path.write_text(yaml.safe_dump(content))
        # One file, and several with an index, take their places differently.
        limit = MergeOptions().out_shard_size if name == "nan_ties" else _SHARD
        flags = ("--quiet", "--no-copy-tokenizer", "--out-shard-size", str(limit))
        options = MergeOptions(quiet=True, copy_tokenizer=False, out_shard_size=limit)
        merge = _merges(path, options)
        made.append(Case(name, path, base, merge, name != "flexmerge", flags=flags))
    return made


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000,
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=8,
        )
    )


def _merges(config: Path, options: MergeOptions) -> Callable[[Path], None]:
    return lambda out: mergekit_ext.merge(config, out, options)


def _merges_adapters(config: Path) -> Callable[[Path], None]:
    def merge(out: Path) -> None:
        run_config(config, out)

    return merge


def _adapter_config(folder: Path) -> dict[str, Any]:
    adapters = [{"model": str(path)} for path in sorted(folder.iterdir())]
    return {"merge_method": "nan", "models": adapters}


def _adapters(folder: Path) -> None:
    shapes = {f"self_attn.{name}_proj": (8 * _WIDTH, 8 * _WIDTH) for name in "qkvo"}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": _RANK,
        "lora_alpha": _RANK,
        "target_modules": [name.rpartition(".")[2] for name in shapes],
    }
    for number in range(4):
        torch.manual_seed(number)
        tensors = {}
        for layer in range(2 * _LAYERS):
            for name, (rows, columns) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(_RANK, columns) / columns**0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, _RANK) / rows**0.5
        own = folder / f"adapter{number}"
        own.mkdir(parents=True)
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        (own / "adapter_config.json").write_text(json.dumps(config))
