"""Merges whose inputs take more memory than a block does; as `caps`, a line of JSON for each.

``python -m tests.limits.inputs FOLDER``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_ext.cli import main
from mergekit_ext.host.checks.source import check_source
from mergekit_ext.io import pickles
from peft_merge.cli import main as adapters
from peft_merge.footprint import need_of
from peft_merge.merge import plan_config
from tests.limits.caps import tell
from tests.models import config, family, write_yaml

FLEXMERGE = {"target_size": 1.5, "algorithm": "average", "granularity": "tensor"}


def run(folder: Path) -> None:
    """Measure everything."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        place = folder / name
        place.mkdir()
        case(place, name)


def _told(folder: Path, name: str, content: dict[str, Any], *extra: str) -> None:
    file = write_yaml(folder / f"{name}.yml", content)
    with pickles.allowed("--allow-pickle" in extra):
        ((_, report),) = check_source(file.read_text(), MergeOptions())
    assert report.estimate is not None, report.problems
    tell(name, report.estimate.need, main, ["merge", str(file), "--quiet", *extra], folder)


def _pickles(folder: Path, name: str) -> None:
    base, tuned = family(folder, _llama(512, 1024, layers=7), amounts=(0.1, 0.2))
    for model in (base, *tuned):
        file = model / "model.safetensors"
        torch.save(load_file(file), model / "pytorch_model.bin")
        file.unlink()
    extra = ("--no-copy-tokenizer", "--allow-pickle")
    _told(folder, name, config("nan", tuned, base), *extra)


def _private(folder: Path, name: str) -> None:
    sizes = {"base": 64, "a": 65536, "b": 65537}
    for model, rows in sizes.items():
        _llama(512, 16, rows=rows)().to(torch.bfloat16).save_pretrained(folder / model)
    tuned = [folder / model for model in sizes if model != "base"]
    content = config("flexmerge", tuned, folder / "base", FLEXMERGE)
    _told(folder, name, content, "--no-copy-tokenizer")


def _vocabularies(folder: Path, name: str) -> None:
    """Of tokens that no two models share."""
    base, tuned = family(folder, _llama(16384, 8, rows=600), torch.bfloat16, amounts=(0.1, 0.2))
    for letter, model in zip("abc", (base, *tuned), strict=True):
        known = {"<unk>": 0, **{f"{letter}{number}": number for number in range(1, 600)}}
        tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        saved.save_pretrained(model)
    _told(folder, name, config("nan", tuned, base, tokenizer={"source": "union"}))


def _whole_tensors(folder: Path, name: str) -> None:
    head = torch.randn(24000, 512).to(torch.bfloat16)
    sources = [_with_head(folder / f"lora{index}", head) for index in range(3)]
    content: dict[str, Any] = {"merge_method": "linear", "modules_to_save": "average"}
    content["models"] = [{"model": str(source)} for source in sources]
    file = write_yaml(folder / f"{name}.yml", content)
    tell(name, need_of(plan_config(file)), adapters, [str(file), "--quiet"], folder)


def _llama(hidden: int, inner: int, rows: int = 64, layers: int = 1) -> Callable[[], Any]:
    fields = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    return lambda: LlamaForCausalLM(fields)


def _with_head(folder: Path, head: Tensor) -> Path:
    """A LoRA that carries a whole tensor."""
    folder.mkdir()
    prefix = "base_model.model."
    module = f"{prefix}model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}lm_head.weight": head}
    for factor, shape in (("A", (8, 64)), ("B", (64, 8))):
        tensors[f"{module}.lora_{factor}.weight"] = torch.full(shape, 0.01)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8}
    lists = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **lists}))
    return folder


CASES: dict[str, Callable[[Path, str], None]] = {
    "pickles": _pickles,
    "private tensors": _private,
    "vocabularies": _vocabularies,
    "whole tensors": _whole_tensors,
}


if __name__ == "__main__":
    run(Path(sys.argv[1]))
