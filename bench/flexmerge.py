"""FlexMerge: writing one size against copying as many bytes, and residuals against an analysis.

    python -m bench.flexmerge                    # 8 and 30 models of ViT-B/32's shape, 10.7 GB
    python -m bench.flexmerge --tasks 8 --runs 3
    python -m bench.flexmerge --disk             # with the models out of the page cache
    python -m bench.flexmerge --quick            # a tiny model, to see that it runs

A checkpoint of size 2, task arithmetic, against reading the same inputs and writing the same
number of bytes with plain file calls. Then a base and residuals of size 1.5 (their mean, `own`
vectors), decomposed and written, against the analysis with the plans of all sizes, and against
copying. The residuals are white noise, which no spectrum is harder than; `--decay` gives them
singular values like k^-0.45. Runs are alternated; medians are shown, and the peak of the process's
own memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from bench import machine
from mergekit_ext.declared import BLOCKS, methods
from mergekit_ext.flexmerge.algorithm import Declared, Parameters
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.decomposition import Decomposition
from mergekit_ext.flexmerge.merging import Merging
from mergekit_ext.flexmerge.plan import Dendrograms
from mergekit_ext.flexmerge.residual import PARAMETERS, Residual, Residuals, ResidualStorage
from mergekit_ext.flexmerge.source import BlockReader, FileSource
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.flexmerge.writer import write_checkpoint
from mergekit_ext.host.flexmerge.shared_tensors import laid_out
from mergekit_ext.io.headers import read_folder
from mergekit_ext.kernels.similarity import cosines

WRITTEN_SIZE, RESIDUAL_SIZE = 2.0, 1.5


def make_models(folder: Path, count: int, quick: bool, decay: bool = False) -> None:
    """A base and `count` fine-tunes of ViT-B/32's shape (86M parameters), float32."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        **({"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2} if quick else {})
    )
    state = CLIPVisionModel(config).state_dict()
    base = {name: t.clone() for name, t in state.items() if t.is_floating_point()}
    for index in range(count + 1):
        home = folder / (f"tuned{index - 1}" if index else "base")
        home.mkdir()
        change = decaying if decay else torch.randn_like
        moved = {n: t + 0.01 * change(t) if index else t for n, t in base.items()}
        save_file(moved, home / "model.safetensors", metadata={"format": "pt"})


def decaying(like: Tensor) -> Tensor:
    """Noise, of a matrix with singular values like k^-0.45 in its place."""
    noise = torch.randn_like(like)
    if noise.ndim < 2:
        return noise
    u, sigma, vh = torch.linalg.svd(noise.flatten(1), full_matrices=False)
    wanted = torch.arange(1, len(sigma) + 1) ** -0.45
    return ((u * wanted * (sigma.norm() / wanted.norm())) @ vh).view_as(like)


def reader_of(folder: Path, count: int) -> BlockReader:
    """A fresh reader of the base and `count` models."""
    homes = [folder / "base", *(folder / f"tuned{i}" for i in range(count))]
    base, *models = (FileSource(home.name, read_folder(home)) for home in homes)
    tasks = [model.name for model in models]
    stored = [(source.tensors, None) for source in (base, *models)]
    parameters = {"heads": "private", "granularity": "component"}
    layout, _, _ = laid_out(tasks, ["base", *tasks], stored, parameters)
    return BlockReader(layout, base, models)


def algorithm_for(count: int) -> Declared:
    """Task arithmetic with the paper's lambda."""
    parameters = Parameters({"lambda": 1.5}, [{"weight": 1.0}] * count)
    return Declared(methods(BLOCKS)["task_arithmetic"], parameters)


def writing(folder: Path, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Write one size, and copy as many bytes, with the analysis done."""
    reader, algorithm = reader_of(folder, count), algorithm_for(count)
    storage = Storage(reader.layout)
    found = analyse(reader)
    blocks = reader.layout.blocks
    similarities = [cosines(found.grams[block.name]) for block in blocks]
    plan = Dendrograms(storage, similarities).plan(Target(WRITTEN_SIZE))
    out = folder / "out"

    def write() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        names = list(reader.layout.tasks)
        origin = {"generator": "bench", "method": {}, "base_model": "b"}
        write_checkpoint(out, reader, plan, Merging(algorithm), origin, names)

    return write, copying(folder, reader.layout.tasks, plan.size.bytes)


def copying(folder: Path, tasks: Sequence[str], size: int) -> Callable[[], None]:
    """Read the base and all models, and write `size` bytes."""
    buffer, out = bytearray(64 << 20), folder / "out"

    def copy() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for home in ("base", *tasks):
            with (folder / home / "model.safetensors").open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        left = size
        with (out / "copy").open("wb", buffering=0) as file:
            while left:
                left -= file.write(memoryview(buffer)[: min(left, len(buffer))])

    return copy


def decomposing(folder: Path, count: int) -> dict[str, Callable[[], None]]:
    """Decompose to one size and write it; analyse and plan every size; copy as many bytes."""
    reader, target = reader_of(folder, count), Target(RESIDUAL_SIZE)
    options = {parameter.name: parameter.default for parameter in PARAMETERS}
    mean = Parameters({"lambda": 1.0}, [{"weight": 1 / count}] * count)
    algorithm = Residual(
        Declared(methods(BLOCKS)["task_arithmetic"], mean),
        Parameters(options, [{"weight": 1.0}] * count),
    )
    stored, out, scratch = ResidualStorage(reader.layout, algorithm), folder / "out", folder / "r"
    blocks = reader.layout.blocks

    def decompose() -> None:
        for place in (out, scratch):
            shutil.rmtree(place, ignore_errors=True)
        out.mkdir()
        residuals = Decomposition(reader, stored, scratch)
        plan = Residuals(stored, residuals.spectra).plan(target)
        merging = Merging(algorithm, None, residuals)
        origin = {"generator": "bench", "method": {}, "base_model": "b"}
        write_checkpoint(out, reader, plan, merging, origin, list(reader.layout.tasks))

    def analysis(densities: list[float] | None = None) -> None:
        found = analyse(reader, densities)
        similarities = [cosines(found.grams[block.name]) for block in blocks]
        planner = Dendrograms(Storage(reader.layout), similarities)
        for size in planner.sizes:
            planner.plan(Target(float(size)))

    return {
        "decompose": decompose,
        "analyse": analysis,
        "analyse for trimming": partial(analysis, [0.2] * count),
        "copy": copying(folder, reader.layout.tasks, stored.budget(target) + stored.least.bytes),
    }


def alternate(
    pair: Mapping[str, Callable[[], None]], runs: int, before: Callable[[], None]
) -> dict[str, list[float]]:
    """Run each once uncounted, then in turn; `before` each run."""
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for turn in range(runs + 1):
        for name, work in pair.items():
            before()
            started = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def forget(folder: Path) -> None:
    """Take the models out of the page cache, so that they come from the disk."""
    for path in folder.glob("*/model.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """Medians, the ratios of the first to the others, and their ranges."""
    ours, *others = seconds
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for theirs in others:
        ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        print(
            f"{title}: {ours} {medians[ours]:.2f} s, {theirs} {medians[theirs]:.2f} s, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"peak {peak:.2f} GiB",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 30])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--decay", action="store_true", help="models with decaying spectra")
    parser.add_argument("--part", choices=["write", "residuals"], help="one of the two")
    parser.add_argument("--folder", type=Path, help="where models are, or are made and kept")
    parser.add_argument("--disk", action="store_true", help="nothing in the page cache")
    arguments = parser.parse_args()
    print(machine.describe())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "base").exists():
            folder.mkdir(exist_ok=True)
            make_models(folder, max(arguments.tasks), arguments.quick, arguments.decay)
        before = partial(forget, folder) if arguments.disk else lambda: None
        for count in arguments.tasks:
            if arguments.part != "residuals":
                write, copy = writing(folder, count)
                title = f"{count} tasks, size {WRITTEN_SIZE:g}"
                show(title, alternate({"write": write, "copy": copy}, arguments.runs, before))
            if arguments.part != "write":
                title = f"{count} tasks, residuals, size {RESIDUAL_SIZE:g}"
                show(title, alternate(decomposing(folder, count), arguments.runs, before))


if __name__ == "__main__":
    main()
