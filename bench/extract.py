"""``peft-merge extract`` against mergekit-extract-lora: one fine-tune, one rank, equal error.

    python -m bench.extract --runs 3

A Llama stored in bfloat16 with matrices of 1024x1024 and 1024x4096, and a fine-tune whose changes
have singular values k^-0.45. Whole processes in turn, processor time; *arithmetic*: the same
matrices decomposed in one process. *Error*: the norm of what is left of all changes, over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bench import machine
from mergekit_ext.kernels.truncated import leading

_DECAY, _CHANGE = 0.45, 0.02


def changed(weight: Tensor) -> Tensor:
    """Return a weight plus a change of a realistic spectrum, of a fiftieth of its norm."""
    side = min(weight.shape)
    left = torch.linalg.qr(torch.randn(weight.shape[0], side))[0]
    right = torch.linalg.qr(torch.randn(weight.shape[1], side))[0]
    change = left * torch.arange(1.0, side + 1) ** -_DECAY @ right.T
    change *= _CHANGE * weight.float().norm() / change.norm()
    return (weight.float() + change).to(weight.dtype)


def make(place: Path, layers: int, width: int) -> list[tuple[str, Tensor]]:
    """Save a base and its fine-tune; return the differences of the matrices as they are stored."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(place / "base")
    found = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                new = changed(parameter)
                found.append((name, new.float() - parameter.float()))
                parameter.copy_(new)
    model.save_pretrained(place / "model")
    return found


def error(folder: Path, changes: list[tuple[str, Tensor]]) -> float:
    """Return the relative error of an adapter, as its factors are stored."""
    stored = {n: t.float() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    rest = whole = 0.0
    for name, change in changes:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        product = stored[f"{module}.lora_B.weight"] @ stored[f"{module}.lora_A.weight"]
        rest += float((change - product).square().sum())
        whole += float(change.square().sum())
    return (rest / whole) ** 0.5


def processor(command: list[str]) -> float:
    """Return the processor time of a process in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def arithmetic(changes: list[tuple[str, Tensor]], rank: int) -> Mapping[str, float]:
    """Return the seconds of the decompositions alone: mergekit's, and those of the product."""
    matrices = [change for _, change in changes]
    return {
        "mergekit": timed(lambda: [torch.linalg.svd(m, full_matrices=False) for m in matrices]),
        "ours": timed(lambda: [leading(m, rank, exact=False) for m in matrices]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(machine.describe())
    commands = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        changes = make(place, options.layers, options.width)
        base, model, rank = str(place / "base"), str(place / "model"), str(options.rank)
        stock = [str(commands / "mergekit-extract-lora"), "--model", model, "--base-model", base]
        seconds: dict[str, list[float]] = {"mergekit": [], "ours": []}
        errors = {}
        for run in range(options.runs):
            outs = {name: place / f"{name}{run}" for name in seconds}
            theirs = [*stock, "--out-path", str(outs["mergekit"]), "--max-rank", rank]
            ours = [sys.executable, "-m", "peft_merge", "extract", base, model, str(outs["ours"])]
            for name, command in (("mergekit", theirs), ("ours", [*ours, "--rank", rank, "-q"])):
                seconds[name].append(processor(command))
                errors[name] = error(outs[name], changes)
            print(json.dumps({name: each[-1] for name, each in seconds.items()}), flush=True)
        alone = arithmetic(changes, options.rank)
    for what, values in (
        ("whole process", {name: statistics.median(each) for name, each in seconds.items()}),
        ("arithmetic", alone),
    ):
        ratio = values["mergekit"] / values["ours"]
        print(f"{what}: {values['mergekit']:.1f} s / {values['ours']:.1f} s = {ratio:.1f}")
    print(f"error: {errors['mergekit']:.5f}, ours {errors['ours']:.5f}")


if __name__ == "__main__":
    main()
