"""Everything that is claimed for a GPU, measured on one: under nine minutes.

    python -m bench.gpu           # one JSON line a measurement as it is made, then one table
    python -m bench.gpu --small   # the same functions with other sizes, on any machine

Needs the repository, torch, transformers, peft, safetensors, pydantic, and mergekit for sections
with FlexMerge's engine. Each section runs in a process of its own, which is killed at its deadline;
what it had measured by then stands, and the other sections run whatever becomes of one. Memory is
what the device's allocator held.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bench import machine, peft, serving
from mergekit_ext.core.memory import square_of, working
from mergekit_ext.declared import BLOCKS, methods
from mergekit_ext.flexmerge import Batched
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.merging import Merging, Walk
from mergekit_ext.flexmerge.plan import Dendrograms
from mergekit_ext.flexmerge.storage import Storage
from mergekit_ext.kernels.lore import lore
from mergekit_ext.kernels.numerics import chunk_length
from mergekit_ext.kernels.similarity import cosines

Row = dict[str, Any]
MODELS = 3
MU_RELATIVE = 0.1
# Singular values of full fine-tunes fall like k to these powers.
SPECTRA = (-0.45, -0.3)
# What has no default, or another one than a user would take.
OPTIONS: Mapping[str, Mapping[str, Any]] = {"lore": {"mu_relative": MU_RELATIVE}}


@dataclass(frozen=True)
class Vit:
    """A vision transformer's shape, so many models of it, and the paper's all sizes / one."""

    name: str
    count: int
    fields: Mapping[str, int]
    paper: float | None = None


# With 12 heads, and patches of 32, unless it says otherwise.
_B32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_L14 |= {"num_attention_heads": 16, "patch_size": 14}
_TINY = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    side: int  # of square matrices
    # Shapes of a language model with how many of each there are; the last are its embeddings.
    language_model: Mapping[tuple[int, int], int]
    vits: Sequence[Vit]
    adapter_side: int
    adapter_pairs: int
    # Vision transformers that are served in so many batches, with so many images of each task.
    served: Sequence[tuple[str, Mapping[str, int], torch.dtype]]
    batches: int
    images: int


FULL = Sizes(
    side=4096,
    language_model={(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 96, (128256, 4096): 2},
    vits=(
        Vit("ViT-B/32", 8, _B32, 2.9),
        Vit("ViT-B/32", 30, _B32, 10.5),
        Vit("ViT-L/14", 8, _L14),
    ),
    adapter_side=4096,
    adapter_pairs=len(peft.PAIRS),
    served=(
        ("ViT-B/32", _B32, torch.float32),
        ("ViT-B/32", _B32, torch.bfloat16),
        ("ViT-L/14", _L14, torch.bfloat16),
    ),
    batches=50,
    images=32,
)
SMALL = Sizes(
    side=48,
    language_model={(32, 32): 2, (64, 32): 2, (256, 32): 1},
    vits=(Vit("tiny", 3, _TINY),),
    adapter_side=64,
    adapter_pairs=1,
    served=(("tiny", _TINY, torch.float32),),
    batches=2,
    images=2,
)


def device_of() -> torch.device:
    """Return the accelerator, or else the CPU; only processes of sections ask."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def settled() -> float:
    """Return the time when the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    started = settled()
    result = work()
    return settled() - started, result


def relative(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.cpu().double() - expected).norm() / expected.norm())


def merges(
    side: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Any, Sequence[Tensor], Callable[[], Tensor]]]:
    """Yield every method for blocks with its inputs, and the merge of one square matrix by it."""
    # Here, as it needs mergekit, which other sections do without.
    from tests.flexmerge.inputs import algorithm, reader

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(side, side, generator=generator)
    states = [
        {"mlp.up.weight": (base + 0.1 * torch.randn(side, side, generator=generator)).to(dtype)}
        for _ in range(MODELS)
    ]
    source = reader({"mlp.up.weight": base.to(dtype)}, states, str(device))
    (block,) = source.layout.blocks
    members = list(range(MODELS))
    for name in methods(BLOCKS):
        merging = algorithm(name, MODELS, OPTIONS.get(name))
        data = source.read(block)

        def merge(merging: Any = merging, data: Any = data) -> Tensor:
            if merging.masks:
                unified: Tensor = merging.merge_masked(data, members, dtype).unified
                return unified
            merged: Tensor = merging.merge(data, members, dtype)
            return merged

        yield merging, list(data.models.values()), merge


def run_methods(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Every method in float32 on the device against float64 on the CPU."""
    side = min(sizes.side, 512)
    exact = {merging.name: m() for merging, _, m in merges(side, torch.device("cpu"), torch.double)}
    for merging, _, merge in merges(side, device):
        seconds, merged = seconds_of(merge)
        yield {
            "name": merging.name,
            "seconds": seconds,
            "error": relative(merged, exact[merging.name]),
        }


def models_with(shape: tuple[int, int], power: float, device: torch.device) -> list[Tensor]:
    """A base, and fine-tunes whose singular values fall like k to a power, on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    least = min(shape)
    values = torch.arange(1, least + 1, device=device, dtype=torch.float32) ** power
    base = normal(*shape)
    models = []
    for _ in range(MODELS):
        left = torch.linalg.qr(normal(shape[0], least)).Q
        right = torch.linalg.qr(normal(shape[1], least)).Q
        models.append(base + (left * values) @ right.T)
    return models


def run_lore(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """LoRE without a base at mu 0.1 of the largest singular value; `svd` times its reference."""
    lore(models_with((64, 64), SPECTRA[0], device), mu_relative=MU_RELATIVE)  # libraries start
    for power in SPECTRA:
        models = models_with((sizes.side, sizes.side), power, device)
        seconds, found = seconds_of(partial(lore, models, mu_relative=MU_RELATIVE))
        yield {
            "name": f"k^{power}",
            "seconds": seconds,
            "iterations": found.iterations,
            "ranks": list(found.ranks),
            "converged": found.converged,
        }


def run_svd(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One full SVD of each model, which Algorithm 1 needs in every iteration."""
    models = models_with((sizes.side, sizes.side), SPECTRA[0], device)
    torch.linalg.svd(models[0][:64, :64])
    for model in models[:2]:
        seconds, _ = seconds_of(partial(torch.linalg.svd, model, full_matrices=False))
        yield {"name": "one model", "seconds": seconds}


def run_language_model(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """LoRE of each shape of a language model, bfloat16; the whole is extrapolated."""
    total = 0.0
    for shape, count in sizes.language_model.items():
        models = [m.bfloat16() for m in models_with(shape, SPECTRA[0], device)]
        seconds, found = seconds_of(partial(lore, models, mu_relative=MU_RELATIVE))
        total += count * seconds
        yield {
            "name": f"{shape[0]}x{shape[1]}",
            "seconds": seconds,
            "iterations": found.iterations,
            "all so far": total,
        }


def run_flexmerge(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """FlexMerge in memory, task arithmetic: the analysis, one size, and all sizes."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from tests.flexmerge.inputs import algorithm, reader

    for vit in sizes.vits:
        with torch.device("meta"):
            shapes = CLIPVisionModel(CLIPVisionConfig(**vit.fields)).state_dict()
        shapes = {name: t.shape for name, t in shapes.items() if t.is_floating_point()}
        base = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
        states = [
            {n: (t + 0.01 * torch.randn_like(t)).cpu() for n, t in base.items()}
            for _ in range(vit.count)
        ]
        source = reader({name: t.cpu() for name, t in base.items()}, states, str(device))
        merging = Merging(algorithm("task_arithmetic", vit.count))
        analysed, found = seconds_of(partial(analyse, source))
        similarities = [cosines(found.grams[block.name]) for block in source.layout.blocks]
        planner = Dendrograms(Storage(source.layout), similarities)

        def walk(steps: Sequence[int], models: Walk, plans: Dendrograms) -> None:
            for step in steps:
                models.go(plans.at(step))

        steps = range(len(planner.trajectory))
        half, walks = steps[len(steps) // 2], [Walk(source, merging) for _ in range(2)]
        one, _ = seconds_of(partial(walk, [half], walks[0], planner))
        every, _ = seconds_of(partial(walk, steps, walks[1], planner))
        yield {
            "name": f"{vit.count} {vit.name}",
            "analysis": analysed,
            "one size": one,
            "sizes": len(steps),
            "seconds": every,
            "all / one": (analysed + every) / (analysed + one),
            "paper": vit.paper,
        }


def run_adapters(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """`add_merged_adapter` against PEFT's `add_weighted_adapter`, one module, on the device."""
    model = peft.make_model(sizes.adapter_side).to(device)
    for pair in peft.PAIRS[: sizes.adapter_pairs]:
        took: dict[str, float] = {}
        for _ in range(2):  # the first starts libraries
            for who, call in peft.CALLS.items():
                took[who], _ = seconds_of(partial(call, model, pair))
                model.delete_adapter("merged")
        yield {
            "name": f"{pair.method} / {pair.theirs}",
            "seconds": took["ours"],
            "theirs": took["theirs"],
            "ratio": took["theirs"] / took["ours"],
        }


@torch.inference_mode()
def run_serving(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Batches with images of all tasks in turn against one model, alternated (the paper: 1.02)."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    for name, fields, dtype in sizes.served:
        config = CLIPVisionConfig(**fields)
        one = CLIPVisionModel(config).to(device, dtype).eval()
        tasks = serving.TASKS * sizes.images
        shape = (len(tasks), 3, config.image_size, config.image_size)
        pixels = torch.randn(shape, device=device, dtype=dtype)
        for size in (2, len(serving.TASKS)):
            models = serving.grouped(one, size)
            mixed = Batched(models)
            ways = (partial(one, pixels), partial(mixed, pixels, tasks=tasks))
            found = [way().pooler_output for way in ways][-1]  # libraries start
            expected = models[tasks[0]](pixels[:: len(models)]).pooler_output
            taken = [[seconds_of(way)[0] for way in ways] for _ in range(sizes.batches)]
            yield {
                "name": f"{name}, {dtype}, size {size}",
                "seconds": sum(own for _, own in taken),
                "one model": sum(own for own, _ in taken),
                "ratio": statistics.median(own / first for first, own in taken),
                "goal": 1.05,
                "error": relative(found[:: len(models)], expected.cpu()),
            }


def run_memory(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The peak of each merge of one matrix above its inputs, against the estimate."""
    entries = sizes.side**2
    for merging, inputs, merge in merges(sizes.side, device):
        width = inputs[0].itemsize
        copies = merging.copies(MODELS, square_of((sizes.side, sizes.side)))
        piece = chunk_length(device.type) * width
        estimate = sum(working(copies, entries * width, MODELS, piece, 1).values())
        row: Row = {"name": merging.name, "estimate": estimate + entries * width}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        merge()
        if device.type == "cuda":
            row["peak"] = torch.cuda.max_memory_allocated() - before
            row["peak / estimate"] = row["peak"] / row["estimate"]
        yield row


def run_bytes(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Whether each method gives the same bytes twice."""
    for merging, _, merge in merges(min(sizes.side, 2048), device):
        yield {"name": merging.name, "same": torch.equal(merge(), merge())}


def run_failing(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A section that fails after a measurement."""
    yield {"name": "before"}
    raise ValueError("as it should")


def run_endless(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A section that does not end."""
    while True:
        time.sleep(60)
    yield {}


# With the seconds that each may take.
SECTIONS: Mapping[str, tuple[Callable[[Sizes, torch.device], Iterator[Row]], float]] = {
    "methods": (run_methods, 50),
    "lore": (run_lore, 60),
    "svd": (run_svd, 40),
    "language model": (run_language_model, 100),
    "flexmerge": (run_flexmerge, 120),
    "adapters": (run_adapters, 50),
    "serving": (run_serving, 60),
    "memory": (run_memory, 25),
    "bytes": (run_bytes, 25),
}
# Of the small form, which shows that the others run whatever becomes of one.
TRIALS = {"failing": (run_failing, 50), "endless": (run_endless, 0.5)}


def _child(name: str, sizes: Sizes, rows: Connection) -> None:
    torch.manual_seed(0)
    try:
        device = device_of()
        if device.type == "cpu":
            torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
        for row in (SECTIONS | TRIALS)[name][0](sizes, device):
            rows.send(row)
    except Exception as error:  # of any kind: the other sections run
        rows.send({"name": "failed", "problem": f"{type(error).__name__}: {error}"[:500]})


def measured(name: str, sizes: Sizes) -> Iterator[Row]:
    """Yield the rows of one section, which has a process and a deadline of its own."""
    # A fork: libraries are loaded once. This process never uses the device, or it could not.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sizes, sender), daemon=True)
    _, limit = (SECTIONS | TRIALS)[name]
    if sizes is SMALL and name in SECTIONS:
        limit *= 5  # which machine that is, and what else it does, is not known
    end = time.monotonic() + limit
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            yield {"section": name, **receiver.recv()}
        yield {"section": name, "name": "stopped", "problem": f"deadline of {limit:g} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"section": name, "name": "ended", "problem": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def against_svd(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield how much sooner LoRE was done than its own iterations with full SVDs (goal: 100)."""
    svds = [r["seconds"] for r in rows if r["section"] == "svd" and "seconds" in r]
    for row in rows:
        if svds and row["section"] == "lore" and "seconds" in row:
            ratio = MODELS * row["iterations"] * min(svds) / row["seconds"]
            yield {"section": "lore", "name": f"{row['name']} against SVDs", "ratio": ratio}


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run every section; print each row when it is there, and all as a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS, *TRIALS], help="only these")
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else FULL
    rows: list[Row] = []

    def note(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    for name in arguments.sections or [*SECTIONS, *(TRIALS if arguments.small else ())]:
        for row in measured(name, sizes):
            note(row)
    for row in [*against_svd(rows)]:
        note(row)
    # Last: it asks the device, and the process could not be forked after that.
    print(f"\n{machine.describe()}\n\n| section | what | found |\n| --- | --- | --- |")
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in ("section", "name")}
        found = ", ".join(f"{key} {shown(value)}" for key, value in rest.items())
        print(f"| {row['section']} | {row['name']} | {found} |")


if __name__ == "__main__":
    main()
