"""Merges under a cap on memory, each in a process of its own; a line of JSON for each.

``python -m tests.limits.caps FOLDER``
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peaks import give_back, measured
from mergekit_ext import memory
from mergekit_ext.cli import main
from mergekit_ext.host.checks.source import check_source
from peft_merge.cli import main as adapters
from peft_merge.footprint import need_of
from peft_merge.merge import plan_config
from tests.models import config, family, write_yaml

# What the process holds may change by some pages between two looks at it.
MARGIN = 4 << 20
METHODS: dict[str, dict[str, Any]] = {
    "nan": {"method": "nan"},
    "nan_ties": {"method": "nan_ties", "parameters": {"density": 0.3}},
    "lore": {"method": "lore", "parameters": {"mu_relative": 0.2, "max_iterations": 4}},
    "tsv_m": {"method": "tsv_m"},
    "pcb": {"method": "pcb"},
    "emr": {"method": "emr"},
    "flexmerge ties": {
        "method": "flexmerge",
        "parameters": {"target_size": 1.5, "algorithm": "ties"},
    },
    "flexmerge emr": {
        "method": "flexmerge",
        "parameters": {"target_size": 2.6, "algorithm": "emr"},
    },
}
RULES: dict[str, dict[str, Any]] = {
    "peft linear": {"merge_method": "linear"},
    "peft ties": {"merge_method": "ties", "parameters": {"density": 0.3}, "rank": 8},
}


def run(folder: Path) -> None:
    """Measure everything."""
    torch.set_num_threads(1)
    base, tuned = family(folder, _model, torch.bfloat16)
    for name, case in METHODS.items():
        content = config(case["method"], tuned, base, case.get("parameters"))
        if name == "lore":
            del content["base_model"]
        file = write_yaml(folder / f"{name}.yml", content)
        ((_, report),) = check_source(file.read_text(), MergeOptions())
        assert report.estimate is not None, report.problems
        options = ["--no-copy-tokenizer", "--quiet"]
        tell(name, report.estimate.need, main, ["merge", str(file), *options], folder)
    _larger(folder)
    sources = _loras(folder)
    for name, rule in RULES.items():
        content = {**rule, "models": [{"model": str(source)} for source in sources]}
        file = write_yaml(folder / f"{name}.yml", content)
        need = need_of(plan_config(file))
        tell(name, need, adapters, [str(file), "--quiet"], folder)


def _larger(folder: Path) -> None:
    """A gigabyte of inputs, which are zeros on a disk that keeps none of them."""
    models = [_sparse(folder / f"sparse{index}") for index in range(3)]
    file = write_yaml(folder / "larger.yml", config("nan", models[1:], models[0]))
    ((_, report),) = check_source(file.read_text(), MergeOptions())
    assert report.estimate is not None, report.problems
    arguments = ["merge", str(file), "--no-copy-tokenizer", "--quiet"]
    tell("larger than its cap", report.estimate.need, main, arguments, folder)
    shutil.rmtree(folder / "out" / "larger than its cap", ignore_errors=True)


def _sparse(folder: Path) -> Path:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    fields = LlamaConfig(vocab_size=16384, torch_dtype="bfloat16", **shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(fields)
    fields.architectures = ["LlamaForCausalLM"]
    fields.save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def tell(
    name: str, need: memory.Need, command: Callable[..., Any], arguments: list[str], folder: Path
) -> None:
    """Run a command under caps of what it needs and of less; print what became of it."""
    give_back()
    enough = memory.held() + memory.OVERHEAD + need.bytes + MARGIN
    place, other = folder / "out" / name, folder / "refused" / name

    def under(cap: int, out: Path) -> Callable[[], object]:
        return lambda: command([*arguments, str(out), "--max-memory", str(cap)])

    accepted = measured(under(enough, place))
    refused = measured(under(enough - 2 * MARGIN, other))
    told = {
        "name": name,
        "cap": enough,
        "inputs": sum(path.stat().st_size for path in folder.glob("sparse*/model.safetensors")),
        "need": need.bytes,
        "accepted": asdict(accepted),
        "refused": refused.code,
        "written": place.is_dir(),
        "left": other.exists(),
    }
    print(json.dumps(told), flush=True)


def _model() -> LlamaForCausalLM:
    """Two large matrices of a short side that is quickly decomposed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32768,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def _loras(folder: Path) -> list[Path]:
    found = []
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        place = folder / f"lora{index}"
        place.mkdir()
        tensors = {}
        for module, rows, columns in (("q_proj", 512, 4096), ("k_proj", 64, 64)):
            name = f"base_model.model.model.layers.0.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, columns, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 8, generator=generator)
        save_file(tensors, place / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
        fields["target_modules"] = ["q_proj", "k_proj"]
        (place / "adapter_config.json").write_text(json.dumps(fields))
        found.append(place)
    return found


if __name__ == "__main__":
    run(Path(sys.argv[1]))
