"""The LoRE-Merging solver against Algorithm 1 with a full SVD per model per iteration.

    python bench/lore.py                 # 1024x4096 and 2048x2048, float32, three models
    python bench/lore.py --quick         # small shapes, to see that it runs
    python bench/lore.py --device cuda   # 4096x4096 (not run so far: no GPU was at hand)

For each case: a float64 solution is computed to a tolerance of 3e-7 and certified by one full SVD
per model (the residual of Algorithm 1's fixed-point equation is printed). Then the solver runs
with `TOLERANCE`, and the reference, ``torch.linalg.svd(full_matrices=False)`` in the dtype of the
models, runs until theta* is as close to the float64 solution as the solver's, or to `EASY` if the
solver's is closer than that. Solver runs are put before, between and after timed iterations of
the reference. To save hours, only the first `--timed` iterations of the reference are done with
the SVD; the rest, to count them, with `Eigen` (float64 Gram matrix; the iterates are the same up to
rounding). The reference's time is the median iteration times their number.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_ext.kernels.lore import LoreResult, lore
from mergekit_ext.kernels.svt import Eigen

MODELS = 3
RANK = 32
SHAPES = {"cpu": ((1024, 4096), (2048, 2048)), "cuda": ((4096, 4096),)}
QUICK = ((128, 512), (192, 192))
LONGEST_REFERENCE = 400
# Of theta_0, relative to its distance from the mean: errors come out below 1e-4, as they should.
TOLERANCE = 3e-5
# Near the rounding of float32 iterates.
EASY = 1e-5


@dataclass(frozen=True)
class Case:
    name: str
    low_rank: bool
    mu_relative: float


CASES = (
    Case("low rank + noise", True, 0.3),
    Case("full rank", False, 0.8),
    Case("full rank", False, 0.7),  # a fifth of a square difference's singular values are above
    Case("full rank", False, 0.5),
)


def models_of(case: Case, shape: tuple[int, int], device: str) -> list[Tensor]:
    """A common base; updates of norm a tenth of it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, columns = shape
    base = normal(rows, columns)
    models = []
    for _ in range(MODELS):
        update = normal(rows, columns)
        if case.low_rank:
            update = 0.3 * update + normal(rows, RANK) @ normal(RANK, columns) / math.sqrt(RANK)
        models.append((base + 0.1 * update).to(device))
    return models


def threshold(x: Tensor, mu: float) -> Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u * (s - mu).clamp(min=0)) @ v


T = TypeVar("T")


def timed(work: Callable[[], T], device: str) -> tuple[float, T]:
    """Wall time; with one CPU thread its own processor time, which other users do not stretch."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def reference_step(
    models: list[Tensor],
    mean: Tensor,
    theta_0: Tensor,
    mu: float,
    shrink: Callable[[Tensor, float], Tensor] = threshold,
) -> Tensor:
    """One iteration of Algorithm 1 on theta_0."""
    total = torch.zeros_like(mean)
    for model in models:
        total += shrink(model - theta_0, mu)
    return mean - total / len(models)


def measure(case: Case, shape: tuple[int, int], device: str, timed_steps: int) -> None:
    models = models_of(case, shape, device)
    mean = torch.stack(models).mean(0)
    wide = [m.double() for m in models]
    wide_mean = torch.stack(wide).mean(0)
    found = lore(models, mu_relative=case.mu_relative, tolerance=TOLERANCE)  # also the warm-up
    mu = found.mu or 0.0
    tight = lore(wide, mu=mu, tolerance=3e-7, max_iterations=500)
    again = reference_step(wide, wide_mean, tight.base, mu)
    moved = torch.linalg.norm(tight.base - wide_mean)
    residual = float(torch.linalg.norm(again - tight.base) / moved)

    def error(theta_0: Tensor) -> float:
        """Of theta* = theta_0 + sum_i (theta_i - theta_0) [the fixed point], over its change."""
        return float(torch.linalg.norm(theta_0.double() - tight.base) / moved)

    def run() -> LoreResult:
        return lore(models, mu=mu, tolerance=TOLERANCE)

    def counted(x: Tensor, mu: float) -> Tensor:
        return Eigen.of(x, torch.float64).threshold(mu).value

    solver, steps, theta_0 = [timed(run, device)[0]], [], mean
    goal = error(found.base)
    target, reached, count = max(goal, EASY), math.inf, 0
    while reached > target and count < LONGEST_REFERENCE:
        if count < timed_steps:
            work = partial(reference_step, models, mean, theta_0, mu)
            seconds, theta_0 = timed(work, device)
            steps.append(seconds)
            if count % 2:
                solver.append(timed(run, device)[0])
        else:
            theta_0 = reference_step(models, mean, theta_0, mu, counted)
        count += 1
        reached = error(theta_0)

    ours = statistics.median(solver)
    theirs = statistics.median(steps) * count
    print(
        f"{shape[0]}x{shape[1]}  {case.name}, mu/sigma_1 {case.mu_relative}, ranks {found.ranks}\n"
        f"    solver     {ours:8.3f} s  {found.iterations:4} iterations  error {goal:.1e}"
        f"  (runs {', '.join(f'{s:.2f}' for s in solver)})\n"
        f"    reference  {theirs:8.3f} s  {count:4} iterations  error {reached:.1e}"
        f"  ({statistics.median(steps):.2f} s each)\n"
        f"    ratio      {theirs / ours:8.1f}    residual of the float64 solution {residual:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument(
        "--timed", type=int, default=4, help="iterations of the reference that are timed"
    )
    parser.add_argument(
        "--threads", type=int, help="CPU threads; with 1, processor time is shown, not wall time"
    )
    parser.add_argument("--shape", help="one shape only, as 1024x4096")
    parser.add_argument(
        "--case", type=int, choices=range(len(CASES)), help="one case only: its place in CASES"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    shapes = QUICK if arguments.quick else SHAPES[device]
    if arguments.shape:
        rows, columns = arguments.shape.split("x")
        shapes = ((int(rows), int(columns)),)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(
        f"{name or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {MODELS} models, float32",
        flush=True,
    )
    for shape in shapes:
        for case in CASES if arguments.case is None else CASES[arguments.case :][:1]:
            measure(case, shape, device, arguments.timed)


if __name__ == "__main__":
    main()
