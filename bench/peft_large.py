"""The second part of `bench.peft`: eight adapters of a model with 7B parameters, by the command.

The adapters lie on disk, with the shapes of a Llama (32 layers, 7 modules, r = 16); ``peft-merge``
merges them in a process of its own, whose start counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

METHODS = ("linear", "nan", "lore")
ADAPTERS, RANK = 8, 16


def make(folder: Path, quick: bool) -> int:
    """Eight adapters of a 7B Llama's shapes, bfloat16; the bytes of one."""
    layers, hidden, wide = (2, 64, 172) if quick else (32, 4096, 11008)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(name.rpartition(".")[2] for name in shapes),
    }
    size = 0
    for index in range(ADAPTERS):
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(layers):
            for name, (rows, columns) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                a = torch.randn(RANK, columns, generator=generator)
                b = torch.randn(rows, RANK, generator=generator)
                tensors[f"{key}.lora_A.weight"] = (a / columns**0.5).bfloat16()
                tensors[f"{key}.lora_B.weight"] = (b / rows**0.5).bfloat16()
        own = folder / f"large{index}"
        own.mkdir()
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        (own / "adapter_config.json").write_text(json.dumps(config))
        size = sum(t.numel() * t.element_size() for t in tensors.values())
    return size


def merge(folder: Path, method: str, rank: int | str) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak GiB of one `peft-merge` process."""
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folder / f"large{i}")} for i in range(ADAPTERS)],
        "rank": rank,
    }
    if method == "lore":
        content["parameters"] = {"mu_relative": 0.1}
    config = folder / f"{method}.yml"
    config.write_text(yaml.safe_dump(content))
    out = folder / f"out_{method}_{rank}_{time.monotonic_ns()}"
    program = Path(sysconfig.get_path("scripts")) / "peft-merge"
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, program, config, out, "--quiet"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"peft-merge failed with {method}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def measure(place: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Print and return what every method takes; the adapters are made below `place`."""
    results = []
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        # In another process: the peak of a child counts what this one held when it started it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            size = pool.submit(make, folder, quick).result()
        print(f"{ADAPTERS} adapters of {size / 2**20:.0f} MiB each, by peft-merge:")
        for method in METHODS:
            for rank in ("lossless", RANK):
                seconds, processor, peak = merge(folder, method, rank)
                results.append(
                    {"method": method, "rank": rank, "seconds": seconds, "peak_gib": peak}
                )
                print(
                    f"{method}, rank {rank}: {seconds:.1f} s "
                    f"({processor:.1f} s of processor time), peak {peak:.2f} GiB",
                    flush=True,
                )
    return results
