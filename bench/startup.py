"""What starting costs: the import hook in every interpreter, and commands until they are ready.

python -m bench.startup [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from bench import machine

# What each command imports before it looks at its inputs, in units of `import torch`.
READY = {
    "import torch": "import torch",
    "import transformers": "import torch, transformers",
    "mergekit-ext check": "import mergekit_ext.cli.check, mergekit_ext.host.checks.merge",
    "mergekit-ext merge": "import mergekit_ext.cli.merge, mergekit_ext.host.run, mergekit.merge",
    "mergekit-ext analyze": "import mergekit_ext.cli.analyze, mergekit_ext.host.flexmerge.engine",
    "mergekit-ext sizes": "import mergekit_ext.cli.sizes, mergekit_ext.host.flexmerge.sizes",
    "mergekit-ext export": "import mergekit_ext.cli.export, mergekit_ext.flexmerge.reader",
    "mergekit-yaml": "import mergekit.scripts.run_yaml",
}
HELP = {
    f"mergekit-ext {name} --help": ["-m", "mergekit_ext", name, "--help"]
    for name in ("check", "merge", "analyze", "sizes", "export")
}


def start(autoload: str) -> float:
    """Milliseconds of an interpreter that does nothing."""
    environment = {**os.environ, "MERGEKIT_EXT_AUTOLOAD": autoload}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env=environment, check=True)
    return 1000 * (time.perf_counter() - started)


def processor(arguments: list[str], **environment: str) -> float:
    """Seconds of processor time of one interpreter."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{arguments} failed")
    return usage.ru_utime + usage.ru_stime


def commands(rounds: int) -> None:
    """Print processor time of commands, alternated, in units of `import torch`."""
    cases = {name: (["-c", code], {}) for name, code in READY.items()}
    for name in ("mergekit-yaml", "mergekit-ext merge"):
        late = {"MERGEKIT_EXT_LATE_IMPORTS": "0"}
        cases[f"{name}, late imports off"] = (["-c", READY[name]], late)
    cases["mergekit.merge without the hook"] = (
        ["-c", "import mergekit.merge"],
        {"MERGEKIT_EXT_AUTOLOAD": "0"},
    )
    cases |= {name: (arguments, {}) for name, arguments in HELP.items()}
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (arguments, environment) in cases.items():
            measured[name].append(processor(arguments, **environment))
    torch = measured["import torch"]
    for name, seconds in measured.items():
        ratios = sorted(a / b for a, b in zip(seconds, torch, strict=True))
        print(
            f"{name:40} {statistics.median(seconds):5.2f} s, ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def main() -> None:
    """Print the median of the differences of 200 pairs with and without the hook; `commands`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(machine.describe())
    commands(arguments.rounds)
    for _ in range(5):
        start("1")
    pairs = [(start("1"), start("0")) for _ in range(200)]
    difference = statistics.median(a - b for a, b in pairs)
    print(
        f"with the hook {statistics.median(a for a, _ in pairs):.2f} ms, "
        f"without {statistics.median(b for _, b in pairs):.2f} ms, "
        f"median of the differences {difference:.2f} ms"
    )


if __name__ == "__main__":
    main()
