"""Train eight models from nothing, merge them at many sizes, and draw the accuracy-size curve.

    python -m examples.flexmerge --out out/flexmerge

Writes, besides what `examples.flexmerge.train` writes, the curve as sizes.csv, sizes.json and
sizes.png, and merges once more through the stock ``mergekit-yaml``: OUT/merged is a checkpoint of
size 2 with a folder for each task, whose scores are printed last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from transformers import AutoModelForImageClassification

from . import train
from .config import write_config
from .data import TASKS
from .evaluate import evaluate

ALGORITHMS = ("residual", "task_arithmetic", "ties", "emr", "nan")
SIZES = "1,1.25,1.5,2,3,4,6,8"
QUICK_ALGORITHMS = ("residual",)
QUICK_SIZES = "1"
MERGED_SIZE = 2.0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    quick = ["--quick"] if options.quick else []
    train.main(["--out", str(options.out), "--seed", str(options.seed), *quick])
    config = write_config(options.out, MERGED_SIZE)
    algorithms = QUICK_ALGORITHMS if options.quick else ALGORITHMS
    lines = [flag for name in algorithms for flag in ("--algorithm", name)]
    sizes = QUICK_SIZES if options.quick else SIZES
    scored = ("--evaluate", "examples.flexmerge.evaluate:evaluate")
    out = str(options.out.resolve())
    _run("mergekit-ext", "sizes", str(config), out, "--sizes", sizes, *lines, *scored)
    merged = options.out / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    _run("mergekit-yaml", str(config), str(merged.resolve()))
    print(f"\n{merged}, loaded with from_pretrained:")
    for task in TASKS:
        model = AutoModelForImageClassification.from_pretrained(merged / task).eval()
        print(f"  {task:<10} {evaluate(model, task)['accuracy']:.3f}")
    print(f"{time.perf_counter() - began:.0f} s in all. The curve: {options.out / 'sizes.png'}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.flexmerge", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/flexmerge"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few training steps: a smoke test")
    return parser.parse_args(arguments)


def _run(command: str, *arguments: str) -> None:
    """An installed command, as a user runs it, from the root of the repository."""
    program = Path(sysconfig.get_path("scripts")) / command
    root = Path(__file__).resolve().parents[2]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, program, *arguments], cwd=root, env=offline, check=True)


if __name__ == "__main__":
    sys.exit(main())
