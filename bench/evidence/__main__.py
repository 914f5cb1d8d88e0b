"""Which method and which factor: merges of real fine-tunes, as published, calibrated, and tuned.

    python -m bench.evidence --out out/evidence          # hours; what is there is kept
    python -m bench.evidence --families vit --seeds 0
    python -m bench.evidence --tables                    # of what is there
    python -m bench.evidence --quick                     # a few steps, to see that it runs

Every family is made three times, from its own start, data and seed. A method is scored as
published, with the factor "auto" where it has one, and tuned: over its variants, and over the
factor of the merged change at `rows.NORMS`, by validation data. *Normalised*: the mean over tasks
of the accuracy on test data over that of the task's own model. OUT/<family><seed>.jsonl has every
score.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench import machine
from bench.evidence import tables
from bench.evidence.families import FAMILIES, be_modest
from bench.evidence.measure import measure


def main() -> None:
    """Measure what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/evidence"), help="kept between runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="a few steps of training")
    arguments = parser.parse_args()
    be_modest()
    print(machine.describe(), flush=True)
    if not arguments.tables:
        jobs = [
            (f, s, arguments.out, arguments.quick)
            for f in arguments.families
            for s in arguments.seeds
        ]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, context, be_modest) as pool:
            for line in pool.map(measure, jobs):
                print(line, flush=True)
    print(tables.tables(arguments.out, arguments.families, arguments.seeds))


if __name__ == "__main__":
    main()
