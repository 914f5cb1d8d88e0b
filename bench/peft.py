"""Merging LoRAs: `add_merged_adapter` against PEFT's `add_weighted_adapter`, and a large merge.

    python -m bench.peft                 # modules of 2048x2048, and 8 adapters of a 7B shape
    python -m bench.peft --quick         # small shapes, to see that it runs

Modules: a live model with some linear layers and four LoRAs of r = 16. Each of our methods runs in
turn with the one of PEFT that it stands for (A B A B ...), with the same rank of the result. Time
is that of the whole call, making the new adapter included, over the number of layers; the adapter
is deleted again between the runs. Error and peak memory are those of one layer.
*error* is the relative Frobenius error against the best approximation of that rank of the merged
change, computed densely in float64; of random types there is no such reference, since every call
draws other entries. Peak memory is that of a process that makes one merge, above what the process
held before it.

`bench.peft_large` is the second part.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, peft_large

ADAPTERS, RANK, DENSITY = 4, 16, 0.3
NAMES = [f"adapter{i}" for i in range(ADAPTERS)]


@dataclass(frozen=True)
class Pair:
    """One of our methods, and the combination type of PEFT that it is compared with."""

    method: str
    options: dict[str, Any]
    theirs: str
    goal: float
    # Of the dense float64 changes; None for random methods.
    exact: Callable[[list[Tensor]], Tensor] | None = None
    their_options: dict[str, Any] = field(default_factory=dict)


def _sum(changes: list[Tensor]) -> Tensor:
    return torch.stack(changes).sum(0)


def _ties(changes: list[Tensor]) -> Tensor:
    """Trim each, elect signs by the sum, mean of what agrees (TIES-Merging, Algorithm 1)."""
    kept = []
    for change in changes:
        flat = change.abs().flatten()
        count = int(DENSITY * flat.numel())
        edge = flat.kthvalue(flat.numel() - count + 1).values
        kept.append(torch.where(change.abs() >= edge, change, 0.0))
    trimmed = torch.stack(kept)
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


_DENSE = {"density": DENSITY}
PAIRS = (
    Pair("linear", {"normalize": False}, "svd", 100.0, _sum),
    Pair("nan", {}, "svd", 100.0),
    Pair("lore", {"mu_relative": 0.1}, "svd", 100.0),
    Pair("tsv_m", {}, "svd", 100.0),
    Pair("peft_ties", _DENSE, "ties_svd", 3.0, _ties, _DENSE),
    Pair("ties", _DENSE, "ties_svd", 3.0, None, _DENSE),
    Pair("peft_dare_ties", _DENSE, "dare_ties_svd", 3.0, None, _DENSE),
)


class Layers(torch.nn.Module):
    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        linear = (torch.nn.Linear(size, size, bias=False) for _ in range(count))
        self.layer = torch.nn.ModuleList(linear)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


def make_model(size: int, layers: int = 1) -> Any:
    """A live model with four random LoRAs, spectra falling as those of trained ones do."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=r"layer\.\d+")
    model = get_peft_model(Layers(size, layers), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    falling = torch.arange(1, RANK + 1, dtype=torch.float32).reciprocal()
    with torch.no_grad():
        for layer in model.base_model.model.layer:
            for name in NAMES:
                layer.lora_A[name].weight.normal_(0, size**-0.5)
                layer.lora_B[name].weight.normal_(0, size**-0.5).mul_(falling)
    return model


def ours(model: Any, pair: Pair) -> None:
    from peft_merge import add_merged_adapter

    add_merged_adapter(
        model, NAMES, [1.0] * ADAPTERS, "merged", method=pair.method, rank=RANK, **pair.options
    )


def theirs(model: Any, pair: Pair) -> None:
    model.base_model.add_weighted_adapter(
        NAMES,
        [1.0] * ADAPTERS,
        "merged",
        combination_type=pair.theirs,
        svd_rank=RANK,
        **pair.their_options,
    )


CALLS = {"ours": ours, "theirs": theirs}


def change(model: Any, name: str) -> Tensor:
    """The dense change of the first layer by one adapter."""
    layer = model.base_model.model.layer[0]
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return layer.scaling[name] * (b.double() @ a.double())


def timed(model: Any, call: Callable[[Any, Pair], None], pair: Pair) -> tuple[float, Tensor]:
    started = time.perf_counter()
    call(model, pair)
    seconds = (time.perf_counter() - started) / len(model.base_model.model.layer)
    result = change(model, "merged")
    model.delete_adapter("merged")
    return seconds, result


def best(merged: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def compare(model: Any, pair: Pair, runs: int) -> dict[str, Any]:
    """Alternate the two; medians, and the ratio of each pair of runs."""
    for call in CALLS.values():
        timed(model, call, pair)
    seconds: dict[str, list[float]] = {name: [] for name in CALLS}
    results = {}
    for _ in range(runs):
        for name, call in CALLS.items():
            took, results[name] = timed(model, call, pair)
            seconds[name].append(took)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    errors = {}
    if pair.exact is not None:
        merged = pair.exact([change(model, name) for name in NAMES])
        target = best(merged, RANK)
        norm = torch.linalg.norm(target)
        errors = {n: float(torch.linalg.norm(r - target) / norm) for n, r in results.items()}
        # How far the best approximation itself is from what was asked for.
        errors["cut off"] = float(torch.linalg.norm(merged - target) / torch.linalg.norm(merged))
    return {
        "method": pair.method,
        "theirs": pair.theirs,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "goal": pair.goal,
        "errors": errors,
    }


def peak_of(index: int, who: str, size: int) -> float:
    """MiB that one merge takes, above what the process held before, in a fresh process."""
    command = [sys.executable, "-m", "bench.peft", "--peak", str(index), who, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_peak(index: int, who: str, size: int) -> None:
    small = make_model(64)
    CALLS[who](small, PAIRS[index])  # imports, and libraries that start threads
    model = make_model(size)
    # Not ru_maxrss: it would begin with that of the process that started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    CALLS[who](model, PAIRS[index])
    print(_peak() - before)


def _peak() -> float:
    """MiB, since the peak was last forgotten."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1024


def modules(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    size = 128 if arguments.quick else arguments.size
    model = make_model(size, arguments.layers)
    dense, factors = size**2 * 4 / 2**20, ADAPTERS * 2 * RANK * size * 4 / 2**20
    print(
        f"{arguments.layers} modules of {size}x{size}, {ADAPTERS} adapters of r = {RANK}, float32; "
        f"each {dense:.1f} MiB dense, {factors:.1f} MiB of factors"
    )
    results = []
    for index, pair in enumerate(PAIRS):
        if arguments.methods and pair.method not in arguments.methods:
            continue
        result = compare(model, pair, arguments.runs)
        result["peak_mib"] = {who: peak_of(index, who, size) for who in CALLS}
        results.append(result)
        seconds, peak = result["seconds"], result["peak_mib"]
        errors = ", ".join(f"{name} {error:.1e}" for name, error in result["errors"].items())
        print(
            f"{pair.method} / {pair.theirs}: {1e3 * seconds['ours']:.1f} ms / "
            f"{1e3 * seconds['theirs']:.0f} ms, {result['ratio']:.1f} times as fast "
            f"(pairs {', '.join(f'{r:.0f}' for r in result['ratios'])}; goal {pair.goal:.0f}); "
            f"peak {peak['ours']:.0f} / {peak['theirs']:.0f} MiB; "
            f"error: {errors or 'no reference'}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each method")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of a module")
    parser.add_argument("--layers", type=int, default=4, help="modules of the model")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--only", choices=("modules", "large"), help="one of the two parts")
    parser.add_argument("--folder", type=Path, help="where the large adapters are written (4 GB)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peak", nargs=3, metavar=("PAIR", "WHO", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        index, who, size = arguments.peak
        measure_peak(int(index), who, int(size))
        return
    print(machine.describe())
    results = {
        part: work()
        for part, work in (
            ("modules", lambda: modules(arguments)),
            ("large", lambda: peft_large.measure(arguments.folder, arguments.quick)),
        )
        if arguments.only in (None, part)
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
