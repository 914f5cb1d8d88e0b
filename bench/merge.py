"""NAN against the methods it wraps, and against a plain loop, as whole processes.

Makes a base and three fine-tunes in bfloat16 with random weights, merges them with each pair in
turn (A B A B ...), and prints wall time, processor time and peak memory as medians, with the ratio
of each pair. The plain loop (`bench.plain`) reads with safetensors, computes the same and writes
one file. *Without start-up*: less what the same process takes for a model of two small layers.
Every run writes its whole output; the page cache is warm after the first, if it holds the models.

    python -m bench.merge --runs 3
    python -m bench.merge --model vit    # of which mergekit has no table: planned by names
    python -m bench.merge --size large   # a Llama of 3.1B parameters: 44 GB of files
    python -m bench.merge --size quick   # a tiny model, to see that it works
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
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTModel

from bench import machine

PLAIN = "plain loop"
# (method, what it is compared with, parameters of both)
PAIRS: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("nan", PLAIN, {}),
    ("nan_ties", PLAIN, {"density": 0.2}),
    ("nan", "task_arithmetic", {}),
    ("nan_ties", "ties", {"density": 0.2}),
)
SIZES = {
    "full": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16},
    "large": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 26},
    "quick": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}


def new_model(kind: str, size: str) -> PreTrainedModel:
    """Return a Llama of 334M or 3.1B parameters, a ViT of 303M (its large form), or a small one."""
    if kind == "llama":
        vocabulary = 128 if size == "quick" else 32000
        config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=16, **SIZES[size])
        return LlamaForCausalLM(config)
    shape = {**SIZES[size], **({"num_hidden_layers": 24} if size == "full" else {})}
    return ViTModel(ViTConfig(num_attention_heads=16, **shape), add_pooling_layer=False)


def make_models(folder: Path, kind: str, size: str) -> int:
    """Save the base and three fine-tunes; return the number of parameters of one."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = new_model(kind, size)
    torch.set_default_dtype(default)
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
    """The YAML of one merge; NAN with the paper's factor, as in the plain loop."""
    nan = method.startswith("nan")
    per_model = {} if nan else {"weight": 0.3}
    content = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / f"tuned{i}"), "parameters": {**per_model, **parameters}}
            for i in range(3)
        ],
        "parameters": {"scale": "paper"} if nan else {},
    }
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(content))
    return path


class Run(NamedTuple):
    """What one process took. Processor time is not stretched by what else the machine does."""

    seconds: float
    processor: float
    peak_gib: float


def run(config: Path, out: Path, plain: bool) -> Run:
    """One process of mergekit-yaml, or of the plain loop."""
    shutil.rmtree(out, ignore_errors=True)
    scripts = Path(sysconfig.get_path("scripts"))
    command = [str(scripts / "mergekit-yaml"), str(config), str(out), "--quiet"]
    if plain:
        command = ["-m", "bench.plain", str(config), str(out)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
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


def require_close(out: Path, plain: Path) -> None:
    """Raise `AssertionError` if more than 3% of the entries differ by a rounding of bfloat16.

    The plain loop keeps all entries at a threshold of TIES; bfloat16 has many equal ones.
    """
    wanted = load_file(plain / "model.safetensors")
    found = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    assert found.keys() == wanted.keys()
    apart = sum(
        int((~torch.isclose(found[name].float(), tensor.float(), rtol=2**-7, atol=1e-5)).sum())
        for name, tensor in wanted.items()
    )
    assert apart <= 0.03 * sum(tensor.numel() for tensor in wanted.values()), apart


def compare(
    folder: Path, tiny: Path, ours: str, theirs: str, parameters: dict[str, float], runs: int
) -> dict[str, Any]:
    """Alternate two methods; medians, and the ratio of each pair of runs."""
    measured: dict[str, list[Run]] = {}
    for place, count in ((tiny, 1), (folder, runs)):
        sides = {
            "ours": (write_config(place, ours, parameters), False),
            "theirs": (
                write_config(place, ours if theirs == PLAIN else theirs, parameters),
                theirs == PLAIN,
            ),
        }
        for config, plain in sides.values():
            run(config, place / ("plain" if plain else "out"), plain)
        if theirs == PLAIN:
            require_close(place / "out", place / "plain")
        for _ in range(count):
            for name, (config, plain) in sides.items():
                measured.setdefault(f"{name}{' tiny' * (place == tiny)}", []).append(
                    run(config, place / "out", plain)
                )
    pairs = list(zip(measured["ours"], measured["theirs"], strict=True))
    start = [measured[f"{name} tiny"][0].processor for name in ("ours", "theirs")]
    return {
        "pair": f"{ours} / {theirs}",
        **{
            field: [
                statistics.median(getattr(m, field) for m in measured[n])
                for n in ("ours", "theirs")
            ]
            for field in Run._fields
        },
        "ratios": [a.seconds / b.seconds for a, b in pairs],
        "processor_ratios": [a.processor / b.processor for a, b in pairs],
        "without_start": [(a.processor - start[0]) / (b.processor - start[1]) for a, b in pairs],
    }


def main() -> None:
    """Measure every pair and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each method")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--model", choices=["llama", "vit"], default="llama")
    parser.add_argument("--methods", nargs="+", help="only these of nan, nan_ties")
    parser.add_argument("--against", nargs="+", help="only against these", metavar="NAME")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    results = []
    print(machine.describe())
    with tempfile.TemporaryDirectory() as name:
        folder, tiny = Path(name) / "models", Path(name) / "tiny"
        make_models(tiny, arguments.model, "quick")
        size = make_models(folder, arguments.model, arguments.size)
        print(f"three fine-tunes of a {arguments.model}, {size / 1e6:.0f}M parameters, bfloat16")
        for ours, theirs, parameters in PAIRS:
            if arguments.methods and ours not in arguments.methods:
                continue
            if arguments.model == "vit" and theirs != PLAIN:
                continue  # mergekit has no table of it
            if arguments.against and theirs not in arguments.against:
                continue
            result = compare(folder, tiny, ours, theirs, parameters, arguments.runs)
            results.append(result)
            seconds, peak = result["seconds"], result["peak_gib"]
            print(
                f"{result['pair']}: {seconds[0]:.1f} s / {seconds[1]:.1f} s, "
                f"ratio {_ratios(result['ratios'])}, "
                f"processor time {_ratios(result['processor_ratios'])}, "
                f"without start-up {_ratios(result['without_start'])}; "
                f"peak {peak[0]:.2f} / {peak[1]:.2f} GiB",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def _ratios(found: list[float]) -> str:
    return f"{statistics.median(found):.2f} ({', '.join(f'{r:.2f}' for r in found)})"


if __name__ == "__main__":
    main()
