"""Memory under a cap, long runs, and Ctrl-C: what docs/limits.md promises, measured.

    python -m bench.robustness --memory --long --interrupts

Prints one line of a table for each merge.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import machine
from bench.interrupted import run as interrupt
from bench.long_runs import cases, other_commands, peaks

_MB = 1e6


def memory(folder: Path) -> None:
    """Merges whose cap is exactly what is asked for; those of the tests."""
    subprocess.run([sys.executable, "-m", "tests.limits.caps", str(folder)], check=True)


def long_runs(folder: Path, tensors: int, models: int, modules: int) -> None:
    """Memory after a third of a run and at its end, and open files."""
    print("| merge | seconds | added in the first third | added | open files |")
    print("| --- | --: | --: | --: | --: |")
    for name, seen in peaks(folder, tensors, models, modules):
        first = (seen.third - seen.before) / _MB
        print(
            f"| {name} | {seen.seconds:.1f} | {first:.0f} MB | {seen.added / _MB:.0f} MB "
            f"| {seen.files} |",
            flush=True,
        )
        if seen.code:
            raise SystemExit(f"{name}: exit code {seen.code}")


def interrupts(folder: Path, count: int) -> None:
    """Ctrl-C at moments that are uniform over each run."""
    draw = random.Random(0)
    print("| merge | interrupts | median | longest | exit codes |")
    print("| --- | --: | --: | --: | --- |")
    commands = [*cases(folder, 300, 12, 100), *other_commands(folder, 1024)]
    for name, command in commands:
        log = folder / "log"
        whole = interrupt(command, None, log)
        if whole.code:
            raise SystemExit(f"{name}: exit code {whole.code}: {whole.said}")
        _clear(folder, name)
        ends = []
        for _ in range(count):
            end = interrupt(command, draw.uniform(0.0, whole.seconds), log)
            ends.append(end)
            if "Traceback" in end.said:
                raise SystemExit(f"{name}: {end.said}")
            _clear(folder, name)
        seconds = [end.seconds for end in ends]
        codes = ", ".join(map(str, sorted({end.code for end in ends})))
        print(
            f"| {name} | {count} | {statistics.median(seconds):.2f} s | {max(seconds):.2f} s "
            f"| {codes} |",
            flush=True,
        )


def _clear(folder: Path, name: str) -> None:
    for place in folder.glob(f"*{name}*"):
        if place.is_dir():
            shutil.rmtree(place)


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--interrupts", action="store_true")
    parser.add_argument("--count", type=int, default=10, help="interrupts of each command")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(machine.describe())
    with tempfile.TemporaryDirectory() as name:
        for wanted, study in (
            (chosen.memory, lambda place: memory(place)),
            (chosen.long, lambda place: long_runs(place, 2000, 30, 200)),
            (chosen.interrupts, lambda place: interrupts(place, chosen.count)),
        ):
            if wanted:
                place = Path(name) / str(len(list(Path(name).iterdir())))
                place.mkdir()
                study(place)


if __name__ == "__main__":
    main()
