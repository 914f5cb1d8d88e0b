"""Merges under a cap on memory, each in a process of its own; a line of JSON for each.

``python -m tests.limits.caps FOLDER``
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.peaks import give_back, measured
from mergekit_ext.cli import main
from mergekit_ext.core import memory
from mergekit_ext.host.checks.merge import check_source
from mergekit_ext.io.headers import allowing_pickles
from peft_merge.cli import main as adapters
from peft_merge.memory_estimate import need_of
from peft_merge.merge import check
from tests.models import config, family, write_yaml

# What the process holds may change by some pages between two looks at it.
PAGES = 4 << 20


def _methods(folder: Path, name: str, method: str, based: bool = True, **parameters: Any) -> None:
    """Two large matrices of a short side that is quickly decomposed."""
    base, tuned = family(folder, _llama(64, 64, rows=32768), torch.bfloat16)
    content = config(method, tuned, base, parameters)
    if not based:
        del content["base_model"]
    _merge(folder, name, content, "--no-copy-tokenizer")


def _larger(folder: Path, name: str) -> None:
    """A gigabyte of inputs, which are zeros on a disk that keeps none of them."""
    models = [_sparse(folder / f"sparse{index}") for index in range(3)]
    _merge(folder, name, config("nan", models[1:], models[0]), "--no-copy-tokenizer")


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


def _pickles(folder: Path, name: str) -> None:
    base, tuned = family(folder, _llama(512, 1024, layers=7), amounts=(0.1, 0.2))
    for model in (base, *tuned):
        file = model / "model.safetensors"
        torch.save(load_file(file), model / "pytorch_model.bin")
        file.unlink()
    _merge(folder, name, config("nan", tuned, base), "--no-copy-tokenizer", "--allow-pickle")


def _private(folder: Path, name: str) -> None:
    sizes = {"base": 64, "a": 65536, "b": 65537}
    for model, rows in sizes.items():
        _llama(512, 16, rows=rows)().to(torch.bfloat16).save_pretrained(folder / model)
    parameters = {"target_size": 1.5, "algorithm": "average", "granularity": "tensor"}
    tuned = [folder / model for model in sizes if model != "base"]
    content = config("flexmerge", tuned, folder / "base", parameters)
    _merge(folder, name, content, "--no-copy-tokenizer")


def _vocabularies(folder: Path, name: str) -> None:
    """Of tokens that no two models share."""
    base, tuned = family(folder, _llama(16384, 8, rows=600), torch.bfloat16, amounts=(0.1, 0.2))
    for letter, model in zip("abc", (base, *tuned), strict=True):
        known = {"<unk>": 0, **{f"{letter}{number}": number for number in range(1, 600)}}
        tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        saved.save_pretrained(model)
    _merge(folder, name, config("nan", tuned, base, tokenizer={"source": "union"}))


def _loras(
    folder: Path, name: str, shape: tuple[int, int], head: Tensor | None = None, **content: Any
) -> None:
    """Three LoRAs of one large module and a small one, or of a small one and a whole tensor."""
    content["models"] = []
    fields: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
    fields["target_modules"] = ["q_proj", "k_proj"]
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for module, (rows, columns) in {"q_proj": shape, "k_proj": (64, 64)}.items():
            key = f"base_model.model.model.layers.0.self_attn.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(8, columns, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 8, generator=generator)
        if head is not None:
            tensors["base_model.model.lm_head.weight"] = head
            fields |= {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
        place = folder / f"lora{index}"
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(fields))
        content["models"].append({"model": str(place)})
    file = write_yaml(folder / "merge.yml", content)
    _report(name, need_of(check(file)), adapters, [str(file), "--quiet"], folder)


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


def _merge(folder: Path, name: str, content: dict[str, Any], *extra: str) -> None:
    file = write_yaml(folder / "merge.yml", content)
    with allowing_pickles("--allow-pickle" in extra):
        ((_, report),) = check_source(file.read_text(), MergeOptions())
    assert report.estimate is not None, report.problems
    _report(name, report.estimate.need, main, ["merge", str(file), "--quiet", *extra], folder)


def _report(
    name: str, need: memory.Need, command: Callable[..., Any], arguments: list[str], folder: Path
) -> None:
    """Run a command under caps of what it needs and of less; print what became of it."""
    give_back()
    enough = memory.held() + memory.MARGIN + need.bytes + PAGES
    place, other = folder / "out", folder / "refused"

    def under(cap: int, out: Path) -> Callable[[], object]:
        return lambda: command([*arguments, str(out), "--max-memory", str(cap)])

    accepted = measured(under(enough, place))
    refused = measured(under(enough - 2 * PAGES, other))
    found = {
        "name": name,
        "cap": enough,
        "inputs": sum(path.stat().st_size for path in folder.glob("*/model.safetensors")),
        "need": need.bytes,
        "accepted": asdict(accepted),
        "refused": refused.code,
        "written": place.is_dir(),
        "left": other.exists(),
    }
    print(json.dumps(found), flush=True)
    shutil.rmtree(folder)


FLEX = {"algorithm": "emr", "target_size": 2.6}
LORE = {"mu_relative": 0.2, "max_iterations": 4}
CASES: dict[str, Callable[[Path, str], None]] = {
    "elementwise, with statistics": partial(
        _methods, method="nan_ties", density=0.3, granularity="model"
    ),
    "lore": partial(_methods, method="lore", based=False, **LORE),
    "tsv_m": partial(_methods, method="tsv_m"),
    "iso_cts": partial(_methods, method="iso_cts"),
    "mergekit's": partial(_methods, method="dare_ties", density=0.5, weight=0.3),
    "block of masks": partial(_methods, method="flexmerge", **FLEX),
    "residuals": partial(_methods, method="flexmerge", algorithm="residual", rank=64),
    "module in its core": partial(_loras, shape=(512, 4096), merge_method="linear"),
    "dense module": partial(
        _loras, shape=(512, 4096), merge_method="ties", parameters={"density": 0.3}, rank=8
    ),
    "whole tensors": partial(
        _loras,
        shape=(64, 64),
        head=torch.ones(24000, 512, dtype=torch.bfloat16),
        merge_method="linear",
        modules_to_save="average",
    ),
    "pickles": _pickles,
    "private tensors": _private,
    "vocabularies": _vocabularies,
    "larger than its cap": _larger,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        place = Path(sys.argv[1]) / name
        place.mkdir()
        case(place, name)
