"""FlexMerge: writing one size against copying as many bytes.

    python -m bench.flexmerge                    # 8 and 30 models of ViT-B/32's shape, 10.7 GB
    python -m bench.flexmerge --tasks 8 --runs 3
    python -m bench.flexmerge --disk             # with the models out of the page cache
    python -m bench.flexmerge --quick            # a tiny model, to see that it runs

A checkpoint of size 2, task arithmetic, against reading the same inputs and writing the same
number of bytes with plain file calls. Runs are alternated; medians are shown, and the peak of the
process's own memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from bench import machine
from mergekit_ext.flexmerge.algorithm import Declared, Parameters
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.merging import Merging
from mergekit_ext.flexmerge.plan import Dendrograms
from mergekit_ext.flexmerge.source import BlockReader, FileSource
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.flexmerge.writer import write_checkpoint
from mergekit_ext.host.flexmerge.shared_tensors import make_layout
from mergekit_ext.io.headers import read_folder
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.methods import BLOCKS, methods

WRITTEN_SIZE = 2.0


def make_models(folder: Path, count: int, quick: bool) -> None:
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
        moved = {n: t + 0.01 * torch.randn_like(t) if index else t for n, t in base.items()}
        save_file(moved, home / "model.safetensors", metadata={"format": "pt"})


def reader_of(folder: Path, count: int) -> BlockReader:
    """A fresh reader of the base and `count` models."""
    homes = [folder / "base", *(folder / f"tuned{i}" for i in range(count))]
    base, *models = (FileSource(home.name, read_folder(home)) for home in homes)
    tasks = [model.name for model in models]
    layout = make_layout(tasks, [base.tensors, *(m.tensors for m in models)])
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

    buffer = bytearray(64 << 20)
    files = [folder / home / "model.safetensors" for home in ("base", *reader.layout.tasks)]

    def copy() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        left = plan.size.bytes
        with (out / "copy").open("wb", buffering=0) as file:
            while left:
                left -= file.write(memoryview(buffer)[: min(left, len(buffer))])

    return write, copy


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
    """Medians, the ratio of the pair, and the range of the pairs' ratios."""
    ours, theirs = seconds
    ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
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
    parser.add_argument("--folder", type=Path, help="where models are, or are made and kept")
    parser.add_argument("--disk", action="store_true", help="nothing in the page cache")
    arguments = parser.parse_args()
    print(machine.describe())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "base").exists():
            folder.mkdir(exist_ok=True)
            make_models(folder, max(arguments.tasks), arguments.quick)
        before = partial(forget, folder) if arguments.disk else lambda: None
        for count in arguments.tasks:
            write, copy = writing(folder, count)
            title = f"{count} tasks, size {WRITTEN_SIZE:g}"
            show(title, alternate({"write": write, "copy": copy}, arguments.runs, before))


if __name__ == "__main__":
    main()
