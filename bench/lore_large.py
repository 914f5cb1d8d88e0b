"""Merges of three models with the shapes of Llama 3 8B, one layer of it, under a cap on memory.

    python -m bench.lore_large --threads 1 --folder FOLDER     # needs 12 GB of disk, and an hour

The models are a random base with updates of rank 32 and noise, in bfloat16, 2.5 GB each: an
embedding and a head of 128,256 x 4,096, and the matrices of one layer. Printed is the most memory
of its own of the process that merges, and its processor time. What was made is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.machine import describe

MODELS, RANK = 3, 32
# Entries of a base like that of a language model, and what the updates add to them.
ENTRY, LOW_RANK, NOISE = 0.02, 0.002, 0.0006
METHODS = {"nan": {}, "lore": {"mu_relative": 0.3}}
FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shapes(fields: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, as transformers has them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def make(folder: Path, seed: int, fields: dict[str, object]) -> Path:
    """Save one model; the base is that of all seeds."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    tensors = {}
    for index, (name, shape) in enumerate(shapes(fields).items()):
        tensors[name] = _tensor(shape, index, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensor(shape: tuple[int, ...], index: int, seed: int) -> Tensor:
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    start, own = (torch.Generator().manual_seed(1000 * n + index) for n in (0, seed + 1))
    right = torch.randn(RANK, shape[1], generator=own).mul_(LOW_RANK * RANK**-0.5)
    out = torch.empty(shape, dtype=torch.bfloat16)
    for part in out.split(4096):
        size = tuple(part.shape)
        value = torch.randn(size, generator=start).mul_(ENTRY)
        value += torch.randn(len(part), RANK, generator=own) @ right
        part.copy_(value.add_(torch.randn(size, generator=own), alpha=NOISE))
    return out


def merge(folder: Path, models: list[Path], method: str, cap: str) -> None:
    """Merge in a process of its own, and watch it."""
    content = {"merge_method": method, "dtype": "bfloat16", "parameters": METHODS[method]}
    content["models"] = [{"model": str(model)} for model in models]
    config, out = folder / f"{method}.yml", folder / f"{method}-out"
    config.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-m", "mergekit_ext", "merge", str(config), str(out)]
    started, most = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--max-memory", cap])
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        most = max(most, _anonymous(process.pid))
        time.sleep(0.1)
    _, status, usage = ended
    print(
        f"{method}, --max-memory {cap}: exit code {os.waitstatus_to_exitcode(status)}, "
        f"{most / 1e9:.2f} GB of anonymous memory, {usage.ru_utime + usage.ru_stime:.0f} s of the "
        f"processor, {time.perf_counter() - started:.0f} s in all",
        flush=True,
    )
    shutil.rmtree(out, ignore_errors=True)


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the models are made; a temporary one")
    parser.add_argument("--max-memory", default="10GB")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--method", action="append", choices=METHODS, help="these methods only")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    print(describe(), flush=True)
    small = {"hidden_size": 64, "intermediate_size": 224, "vocab_size": 2004}
    fields = {**FIELDS, **(small if arguments.small else {})}
    with TemporaryDirectory(dir=arguments.folder) as made:
        models = [make(Path(made) / str(seed), seed, fields) for seed in range(MODELS)]
        for method in arguments.method or METHODS:
            merge(Path(made), models, method, arguments.max_memory)


if __name__ == "__main__":
    main()
