"""The LoRE-Merging solver in sweeps: full SVDs of every model.

    python -m bench.lore --threads 1                    # all cases, three shapes
    python -m bench.lore --shape 1024x1024 --case 0     # one of them
    python -m bench.lore --quick --reference            # small shapes, to see that it runs
    python -m bench.lore --device cuda                  # 4096x4096 (not measured: no GPU at hand)
    python -m bench.lore --shape 128256x4096 --case 0 --memory

For each case the solver runs as a merge to bfloat16 does, between SVDs of the models' differences
(``torch.linalg.svd(full_matrices=False)``), a sweep being one of each. Its error is that of the
merged tensor against a solution with a tolerance of `TIGHT`, in units of the rounding to bfloat16.
Evaluations, and floating point operations of matrix products in units of one Gram matrix of each
model, do not depend on other work on the machine. `--reference` counts the iterations (sweeps) that
Algorithm 1 needs for the same error. `--memory` measures what one run holds beyond its inputs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mergekit_ext.kernels.lore import LoreResult, lore
from mergekit_ext.kernels.svt import Eigen

OUTPUT = torch.bfloat16
SHAPES = {"cpu": ((1024, 1024), (2048, 2048), (1024, 4096)), "cuda": ((4096, 4096),)}
QUICK = ((128, 512), (192, 192))
TIGHT = 2e-5
LONGEST_REFERENCE = 200
# Of entries of a base like that of a language model, and of the largest singular value of updates.
ENTRY, LARGEST = 0.02, 0.5


@dataclass(frozen=True)
class Case:
    """Updates with singular values ``0.5 k^-power``, or of rank 32 with noise (power 0)."""

    power: float
    mu_relative: float
    models: int = 3
    size: float = 1.0

    def __str__(self) -> str:
        spectrum = f"k^-{self.power}" if self.power else "rank 32 + noise"
        close = "" if self.size == 1.0 else f", updates x {self.size}"
        return f"{spectrum}, {self.models} models, mu {self.mu_relative}{close}"


CASES = (
    Case(0.45, 0.1),
    Case(0.3, 0.1),
    Case(0.0, 0.3),
    Case(0.45, 0.5),
    Case(0.45, 0.02),
    Case(0.45, 0.1, models=5),
    Case(0.45, 0.1, size=0.1),
)


def models_of(case: Case, shape: tuple[int, int], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    rank = min(shape)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def update() -> Tensor:
        if not case.power:
            noise = normal(rows, columns).mul_(0.3)
            return noise.add_(normal(rows, 32) @ normal(32, columns), alpha=32**-0.5).mul_(0.002)
        left, right = (torch.linalg.qr(normal(side, rank)).Q for side in shape)
        sigma = LARGEST * torch.arange(1, rank + 1).float() ** -case.power
        return (left * sigma) @ right.T

    base = normal(rows, columns).mul_(ENTRY)
    return [update().mul_(case.size).add_(base).to(device) for _ in range(case.models)]


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


def measure(case: Case, shape: tuple[int, int], device: str, reference: bool) -> None:
    models = models_of(case, shape, device)
    mean = torch.stack(models).mean(0)

    def run() -> LoreResult:
        return lore(models, mu_relative=case.mu_relative, output=OUTPUT)

    solver, svd = [], []
    for model in models[:3]:
        difference = model - mean
        svd.append(timed(lambda d=difference: torch.linalg.svd(d, full_matrices=False), device)[0])
        if len(svd) < 3:
            seconds, found = timed(run, device)
            solver.append(seconds)
    sweep = case.models * statistics.median(svd)
    with FlopCounterMode(display=False) as counter:
        run()
    gram = case.models * 2 * min(shape) ** 2 * max(shape)
    tight = lore(models, mu_relative=case.mu_relative, tolerance=TIGHT)
    rounding = torch.linalg.norm(tight.merged - tight.merged.to(OUTPUT).float())

    def error(merged: Tensor) -> float:
        return float(torch.linalg.norm(merged - tight.merged) / rounding)

    print(
        f"{shape[0]}x{shape[1]}, {case}: {statistics.median(solver) / sweep:.2f} sweeps, "
        f"{found.iterations} evaluations, {counter.get_total_flops() / gram:.0f} products, "
        f"rank {found.ranks[0]}, error {error(found.merged):.3f}, converged {found.converged} "
        f"(runs {', '.join(f'{s:.2f}' for s in solver)} s; one SVD "
        f"{', '.join(f'{s:.2f}' for s in svd)} s; tight: {tight.iterations} evaluations, "
        f"converged {tight.converged})",
        flush=True,
    )
    if reference:
        count = iterations(models, mean, found, error(found.merged), error)
        print(f"    Algorithm 1: {count or f'more than {LONGEST_REFERENCE}'} sweeps", flush=True)


def iterations(
    models: list[Tensor],
    mean: Tensor,
    found: LoreResult,
    target: float,
    error: Callable[[Tensor], float],
) -> int:
    """Return how many iterations Algorithm 1 needs for an error; 0 if more than are tried.

    Thresholded by `Eigen`, with a float64 Gram matrix: the iterates are those of an SVD.
    """
    theta_0, mu = mean, found.mu or 0.0
    for count in range(1, LONGEST_REFERENCE + 1):
        wide = [_wide(model - theta_0) for model in models]
        total = sum(Eigen.of(d, torch.float64).threshold(mu).value for d in wide) / len(models)
        total = total if total.shape == mean.shape else total.T
        theta_0 = mean - total
        if error(theta_0 + len(models) * total) <= target:
            return count
    return 0


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T.contiguous()


def memory(case: Case, shape: tuple[int, int]) -> None:
    """Print what one run holds at most beyond its inputs, tall and in bfloat16."""
    models = tall(case, *shape)
    inputs = sum(model.nbytes for model in models)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts here
    before = _status("VmRSS")
    seconds, found = timed(lambda: lore(models, mu_relative=case.mu_relative, output=OUTPUT), "cpu")
    print(
        f"{shape[0]}x{shape[1]}, {case}: {(_status('VmHWM') - before) / 1e9:.2f} GB beyond inputs "
        f"of {inputs / 1e9:.2f} GB, {seconds:.0f} s, {found.iterations} evaluations, ranks "
        f"{found.ranks}, converged {found.converged}",
        flush=True,
    )


def tall(case: Case, rows: int, columns: int) -> list[Tensor]:
    """Return models made by blocks of rows; their left singular vectors are nearly orthogonal."""
    generator = torch.Generator().manual_seed(0)
    sigma = LARGEST * torch.arange(1, columns + 1).float() ** -case.power / rows**0.5
    models = [torch.empty(rows, columns, dtype=OUTPUT) for _ in range(case.models)]
    frames = [torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q for _ in models]
    for at in range(0, rows, 4096):
        part = slice(at, min(at + 4096, rows))
        base = torch.randn(part.stop - at, columns, generator=generator).mul_(ENTRY)
        for model, frame in zip(models, frames, strict=True):
            left = torch.randn(part.stop - at, columns, generator=generator)
            model[part] = (left * sigma) @ frame + base
    return models


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--reference", action="store_true", help="count Algorithm 1's iterations")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
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
        f"torch {torch.__version__}, float32 to {str(OUTPUT).removeprefix('torch.')}",
        flush=True,
    )
    for shape in shapes:
        for case in CASES if arguments.case is None else CASES[arguments.case :][:1]:
            if arguments.memory:
                memory(case, shape)
            else:
                measure(case, shape, device, arguments.reference)


if __name__ == "__main__":
    main()
