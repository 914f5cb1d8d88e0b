"""Merge two small Llamas that are stored as fp8 with scales of blocks, over a base in fp8.

python -m examples.quantised --out out/quantised
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mergekit_ext

TOKENS, LENGTH, BLOCK = 64, 32, 32
# The next token is a multiple of the one before, plus a constant: one rule for each model.
RULES = {"one": (5, 3), "two": (3, 7)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.quantised", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/quantised"), help="output folder")
    parser.add_argument("--steps", type=int, default=150, help="of training, for each model")
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    shutil.rmtree(options.out, ignore_errors=True)
    base = LlamaForCausalLM(LlamaConfig(**sizes())).float()
    train(base, list(RULES), options.steps)
    models = {"base": base}
    for name in RULES:
        models[name] = train(copy.deepcopy(base), [name], options.steps)
    for name, model in models.items():
        for kind in ("bf16", "fp8"):
            copy.deepcopy(model).bfloat16().save_pretrained(options.out / kind / name)
        store_as_fp8(options.out / "fp8" / name)
    for kind in ("bf16", "fp8"):
        merge(options.out / kind)
    batches = {name: batch(name, seed=1) for name in RULES}
    rows = [f"{kind}/{name}" for kind in ("bf16", "fp8") for name in (*models, "merged")]
    print(f"{'loss of':14}" + "".join(f"{name:>8}" for name in RULES))
    logits: dict[str, Tensor] = {}
    for row in rows:
        # transformers dequantises fp8 itself on a CPU; what was merged is plain bfloat16.
        model = AutoModelForCausalLM.from_pretrained(options.out / row).eval()
        with torch.no_grad():
            found = [model(ids, labels=ids) for ids in batches.values()]
        logits[row] = torch.cat([output.logits.float() for output in found])
        print(f"{row:14}" + "".join(f"{output.loss.item():8.3f}" for output in found))
    distance = (logits["fp8/merged"] - logits["bf16/merged"]).norm() / logits["bf16/merged"].norm()
    print(f"Logits of the two merges differ by {distance:.1%}.")
    return 0


def sizes() -> dict[str, int]:
    return {
        "vocab_size": TOKENS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
    }


def batch(name: str, seed: int, size: int = 32) -> Tensor:
    """Return sequences (size, LENGTH) that follow a rule."""
    factor, constant = RULES[name]
    tokens = torch.randint(TOKENS, (size,), generator=torch.Generator().manual_seed(seed))
    sequence = [tokens]
    for _ in range(LENGTH - 1):
        sequence.append((factor * sequence[-1] + constant) % TOKENS)
    return torch.stack(sequence, 1)


def train(model: LlamaForCausalLM, names: list[str], steps: int) -> LlamaForCausalLM:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        ids = batch(names[step % len(names)], seed=1000 + step, size=16)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def store_as_fp8(folder: Path) -> None:
    """Store the projections of a saved model as DeepSeek's files have them."""
    file, path = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if "_proj." in name]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scales[:, None, :, None]).view(rows, columns)
        tensors[name] = codes.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, file, {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    content = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(content, indent=2))


def merge(folder: Path) -> None:
    document = {
        "merge_method": "nan",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in RULES],
    }
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    config = MergeConfiguration.model_validate(document)
    mergekit_ext.merge(config, folder / "merged", options)


if __name__ == "__main__":
    raise SystemExit(main())
