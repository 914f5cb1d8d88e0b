"""Train LoRA and (IA)^3 adapters, merge them with ``peft-merge``, reload and score the results.

python -m examples.adapters --out out/adapters
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers

from . import decomposition, jobs, report
from .studies import STUDIES


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    jobs.be_modest()
    began = time.perf_counter()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with jobs.pool(1 if options.quick else options.processes) as each:
        rows = jobs.run(each, out, options.quick, options.seed)
    groups = {
        name: (study.measure, [row for row in rows if row.study == name])
        for name, study in STUDIES.items()
    }
    decomposed = decomposition.run(out, options.quick, options.seed)
    seconds = time.perf_counter() - began
    details = {
        "seed": options.seed,
        "quick": options.quick,
        "seconds": round(seconds, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    report.write_json(out / "results.json", [*rows, *decomposed], details)
    report.write_plot(out / "results.png", groups)
    groups[decomposition.NAME] = "perplexity", decomposed
    for name, (measure, some) in groups.items():
        print(f"\n{name}, {measure} on test data:\n\n{report.table(some)}")
    print(f"\n{seconds:.0f} s in all. Written: {out / 'results.json'}, results.png")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.adapters", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/adapters"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few training steps: a smoke test")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="adapters that are trained and merged at the same time",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
