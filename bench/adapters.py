"""``base+adapter`` inputs, applied while reading, against mergekit's own way.

Makes a Llama in bfloat16 and LoRA adapters of it with random values, merges them with the stock
``mergekit-yaml`` in both ways in turn (A B A B ...), and prints wall time, peak memory and the
bytes left on disk besides the output, as medians, with the ratio of each pair. mergekit's own way
(``MERGEKIT_EXT_ADAPTERS=0``) gets an empty ``--lora-merge-cache`` every time: a warm one holds
whole models that somebody has written before.

Memory is the process's own (anonymous) memory, looked at every few milliseconds; pages of files
that are mapped and can be dropped at any time are counted in the second figure only.

    python -m bench.adapters --runs 3
    python -m bench.adapters --quick        # a tiny model, to see that it works
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
from typing import NamedTuple

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bench import machine

SIZES = {
    "full": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16},
    "quick": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}
WAYS = {"while reading": "1", "merged beforehand": "0"}
# mergekit holds a shard until it is full: in both ways, and more than all the rest if it is large.
_SHARD = "100M"
_INTERVAL = 0.005


def make_models(folder: Path, size: str, adapters: int) -> int:
    """Save the base and its adapters; return the number of parameters of the base."""
    config = LlamaConfig(
        vocab_size=32000 if size == "full" else 128, num_attention_heads=16, **SIZES[size]
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    count = sum(p.numel() for p in model.parameters())
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora, adapter_name="a0")
    for index in range(adapters):
        if index:
            adapted.add_adapter(f"a{index}", lora)
        adapted.save_pretrained(folder / "adapters", selected_adapters=[f"a{index}"])
    return count


def write_config(folder: Path, adapters: int) -> Path:
    """The YAML of the merge."""
    paths = [folder / "adapters" / f"a{index}" for index in range(adapters)]
    models = [{"model": f"{folder / 'base'}+{path}"} for path in paths]
    content = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump(content))
    return path


class Run(NamedTuple):
    """What one process took, and left on disk besides its output."""

    seconds: float
    own_gib: float
    resident_gib: float
    disk_gib: float


def run(config: Path, way: str) -> Run:
    """One mergekit-yaml process, into an empty folder and with an empty cache."""
    out, cache = config.parent / "out", config.parent / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    flags = ["--lora-merge-cache", str(cache)] if way == "0" else []
    command = [sys.executable, str(Path(sysconfig.get_path("scripts")) / "mergekit-yaml")]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*command, str(config), str(out), "--quiet", "--out-shard-size", _SHARD, *flags],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "MERGEKIT_EXT_ADAPTERS": way},
        )
        own = 0
        while True:
            # Waited for without being taken away, so that the memory of the dead is not asked for.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            own = max(own, _anonymous(process.pid))
            time.sleep(_INTERVAL)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"{config} failed:\n{errors.read().decode()}")
    left = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return Run(seconds, own / 2**20, usage.ru_maxrss / 2**20, left / 2**30)


def _anonymous(pid: int) -> int:
    """KiB of memory that is of no file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    """Measure both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each way")
    parser.add_argument("--adapters", type=int, default=3, help="inputs of the merge")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    print(machine.describe())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = "quick" if arguments.quick else "full"
        count = make_models(folder, size, arguments.adapters)
        print(
            f"linear of {arguments.adapters} adapters (rank 16, all linear layers) of a Llama with "
            f"{count / 1e6:.1f}M parameters, bfloat16"
        )
        config = write_config(folder, arguments.adapters)
        measured: dict[str, list[Run]] = {way: [] for way in WAYS}
        run(config, "1")  # the page cache is warm after this
        for _ in range(arguments.runs):
            for way, value in WAYS.items():
                measured[way].append(run(config, value))
    ours, theirs = measured.values()
    for field in Run._fields:
        values = {
            way: statistics.median(getattr(r, field) for r in runs)
            for way, runs in measured.items()
        }
        pairs = [(getattr(a, field), getattr(b, field)) for a, b in zip(ours, theirs, strict=True)]
        ratios = ", ".join(f"{a / b:.2f}" if b else "-" for a, b in pairs)
        listed = ", ".join(f"{way} {value:.2f}" for way, value in values.items())
        print(f"{field}: {listed} (ratios of the pairs: {ratios})", flush=True)
    if arguments.json:
        content = {way: [r._asdict() for r in runs] for way, runs in measured.items()}
        arguments.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
