"""NAN against the methods it wraps, as whole processes of the stock ``mergekit-yaml``.

Makes a base and three fine-tunes of a Llama in bfloat16 with random weights, merges them with each
pair of methods in turn (A B A B ...), and prints wall time and peak memory as medians, with the
ratio of each pair. Every run writes its whole output; the page cache is warm after the first.

    python -m bench.merge --runs 3
    python -m bench.merge --quick        # a tiny model, to see that it works
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from bench import machine

PAIRS: tuple[tuple[str, str, dict[str, float]], ...] = (
    # (method, the method it is compared with, parameters of both)
    ("nan", "task_arithmetic", {}),
    ("nan_ties", "ties", {"density": 0.2}),
)
SIZES = {
    "full": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16},
    "quick": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}


def make_models(folder: Path, size: str) -> int:
    """Save the base and three fine-tunes; return the number of parameters of one."""
    config = LlamaConfig(
        vocab_size=32000 if size == "full" else 128, num_attention_heads=16, **SIZES[size]
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for index in range(3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, dtype=torch.bfloat16)
                parameter.copy_(start[name] + 0.002 * (index + 1) * noise)
        model.save_pretrained(folder / f"tuned{index}")
    return sum(p.numel() for p in model.parameters())


def write_config(folder: Path, method: str, parameters: dict[str, float]) -> Path:
    """The YAML of one merge."""
    per_model = {} if method.startswith("nan") else {"weight": 0.3}
    content = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / f"tuned{i}"), "parameters": {**per_model, **parameters}}
            for i in range(3)
        ],
    }
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(content))
    return path


class Run(NamedTuple):
    """What one process took. Processor time is not stretched by what else the machine does."""

    seconds: float
    processor: float
    peak_gib: float


def run(config: Path, out: Path) -> Run:
    """One mergekit-yaml process."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(Path(sysconfig.get_path("scripts")) / "mergekit-yaml")]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(config), str(out), "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"{config} failed:\n{errors.decode()}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def compare(
    folder: Path, ours: str, theirs: str, parameters: dict[str, float], runs: int
) -> dict[str, Any]:
    """Alternate two methods; medians, and the ratio of each pair of runs."""
    configs = {name: write_config(folder, name, parameters) for name in (ours, theirs)}
    for config in configs.values():
        run(config, folder / "out")
    measured: dict[str, list[Run]] = {ours: [], theirs: []}
    for _ in range(runs):
        for name, config in configs.items():
            measured[name].append(run(config, folder / "out"))
    medians = {
        field: {n: statistics.median(getattr(m, field) for m in v) for n, v in measured.items()}
        for field in Run._fields
    }
    pairs = list(zip(measured[ours], measured[theirs], strict=True))
    wall = [a.seconds / b.seconds for a, b in pairs]
    processor = [a.processor / b.processor for a, b in pairs]
    return {
        "pair": f"{ours} / {theirs}",
        **medians,
        "ratios": wall,
        "ratio": statistics.median(wall),
        "processor_ratios": processor,
        "processor_ratio": statistics.median(processor),
    }


def main() -> None:
    """Measure every pair and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each method")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--methods", nargs="+", help="only these of nan, nan_ties")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    results = []
    print(machine.describe())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_models(folder, "quick" if arguments.quick else "full")
        print(f"three fine-tunes of a Llama with {size / 1e6:.0f}M parameters, bfloat16")
        for ours, theirs, parameters in PAIRS:
            if arguments.methods and ours not in arguments.methods:
                continue
            result = compare(folder, ours, theirs, parameters, arguments.runs)
            results.append(result)
            seconds, peak = result["seconds"], result["peak_gib"]
            print(
                f"{result['pair']}: {seconds[ours]:.1f} s / {seconds[theirs]:.1f} s, "
                f"ratio {result['ratio']:.2f} (pairs: "
                f"{', '.join(f'{r:.2f}' for r in result['ratios'])}), "
                f"processor time {result['processor_ratio']:.2f} "
                f"({', '.join(f'{r:.2f}' for r in result['processor_ratios'])}); "
                f"peak {peak[ours]:.2f} / {peak[theirs]:.2f} GiB",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
