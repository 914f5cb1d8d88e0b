"""Accuracy against size of a base with low-rank residuals: three seeds of real fine-tunes.

    python -m bench.residuals --out out/residuals            # an hour; what is there is kept
    python -m bench.residuals --family vit --seeds 0
    python -m bench.residuals --part joint                   # residuals of groups against pure ones
    python -m bench.residuals --part inference               # what LoRA's products cost
    python -m bench.residuals --quick                        # a few steps, to see that it runs

Families: ``vit``, the eight tasks of `examples.flexmerge`; ``bert``, MiniLM fine-tuned in full for
the three tasks of `examples.adapters.texts`. Curves are those of ``mergekit-ext sizes``, one folder
OUT/<family><seed>/<line> each; their means over seeds go to OUT/<family>.csv and are printed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import peft
import torch
import transformers
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch import Tensor

from bench import machine
from examples.adapters import encoder, texts
from examples.flexmerge import train as vits
from examples.flexmerge.data import TASKS
from examples.flexmerge.evaluate import evaluate as score_vit
from mergekit_ext.host.flexmerge.sizes import Evaluate, sizes
from mergekit_ext.kernels.grouping import dendrogram, partition
from mergekit_ext.kernels.similarity import cosines

MODELS = "models"
TEXTS = "texts.json"
SIZE, QUICK_SIZE = texts.Size(120, 900, 0, 150), texts.Size(20, 48, 0, 12)
BERT_STEPS, BERT_LR = 40, 3e-4
PROTOTYPES = 200  # texts that they are the means of
JOINT_SIZES = (1.1, 1.25, 1.5, 2.0, 2.5, 3.0)
RANKS = (4, 16, 64)
RUNS = 9


@dataclass(frozen=True)
class Line:
    """One run of `sizes`: what is asked for, and the parameters of `flexmerge`."""

    sizes: Sequence[float]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    algorithms: Sequence[str] = ("residual",)


@dataclass(frozen=True)
class Family:
    """Fine-tunes of one base: `make` writes them below a folder, for a seed."""

    tasks: Sequence[str]
    make: Callable[[Path, int, bool], None]
    evaluate: Callable[[Path], Evaluate]
    lines: Mapping[str, Line]


def make_vits(home: Path, seed: int, quick: bool) -> None:
    """Train the models of `examples.flexmerge`."""
    vits.main(["--out", str(home), "--seed", str(seed), "--processes", "1", *["--quick"] * quick])


def make_berts(home: Path, seed: int, quick: bool) -> None:
    """Fine-tune MiniLM, the whole of it, for each task."""
    texts.write_tasks(home / TEXTS, QUICK_SIZE if quick else SIZE, seed)
    tasks, embed, prototypes = _tools(home)
    _bert().save_pretrained(home / MODELS / "base")
    for number, task in enumerate(texts.TASKS, start=1):
        model, steps = _bert(), 2 if quick else BERT_STEPS
        examples = tasks[task]["train"]
        encoder.train(model, embed, prototypes[task], examples, steps, BERT_LR, seed + number)
        model.save_pretrained(home / MODELS / task)


def score_bert(home: Path) -> Evaluate:
    """Return what scores a model by the nearest prototype of a class."""

    def score(model: Any, task: str) -> float:
        tasks, embed, prototypes = _tools(home)
        return encoder.accuracy(model, embed, prototypes[task], tasks[task]["test"])

    return score


def _bert() -> Any:
    return transformers.BertModel.from_pretrained(encoder.model_folder()).eval()


@functools.lru_cache(maxsize=1)
def _tools(home: Path) -> tuple[Any, encoder.Embedder, dict[str, Tensor]]:
    tasks, embed = texts.read_tasks(home / TEXTS), encoder.Embedder()
    return tasks, embed, encoder.prototypes(_bert(), embed, tasks, PROTOTYPES)


def lines_of(sizes: Sequence[float], flexmerge: Sequence[float]) -> dict[str, Line]:
    """Return residuals over several bases at `sizes`, and algorithms of FlexMerge."""
    bases: dict[str, dict[str, Any]] = {
        "average": {},
        "given": {},
        "nan": {"scale": 1.0},
        "lore": {"mu_relative": 0.1, "combine": "mean", "lambda": 1.0},
        "task_arithmetic": {},
    }
    return {
        **{f"over {name}": Line(sizes, {"base": name, **more}) for name, more in bases.items()},
        "flexmerge": Line(flexmerge, algorithms=("task_arithmetic", "ties", "emr")),
    }


FAMILIES = {
    "vit": Family(
        TASKS,
        make_vits,
        lambda home: score_vit,
        {
            **lines_of((1.14, 1.24, 1.39, 1.64, 2.14), (1.0, 1.5, 2.0, 3.0)),
            "vectors shared": Line((1.1, 1.25, 1.5), {"vectors": "shared"}),
        },
    ),
    "bert": Family(texts.TASKS, make_berts, score_bert, lines_of((1.1, 1.25, 1.5), (1.0, 2.0))),
}


def models_of(name: str, seed: int, out: Path, quick: bool) -> Path:
    """Return the folder of a family's models, which are made if they are not there."""
    home = out / f"{name}{seed}"
    if not (home / MODELS).exists():
        made = home.with_suffix(".part")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        FAMILIES[name].make(made, seed, quick)
        made.rename(home)
    return home


def curve(home: Path, name: str, family: Family, line: Line) -> list[dict[str, Any]]:
    """Return the points of a line, which is measured if it is not there."""
    folder = home / name.replace(" ", "_")
    if not folder.exists():
        made = folder.with_suffix(".part")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        models = (home / MODELS).resolve()
        document = {
            "merge_method": "flexmerge",
            "base_model": str(models / "base"),
            "models": [
                {"model": str(models / task), "parameters": {"task": task}} for task in family.tasks
            ],
            "parameters": dict(line.parameters),
        }
        config = made / "merge.yml"
        config.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        options = MergeOptions(quiet=True)
        sizes(config, made, options, line.sizes, line.algorithms, family.evaluate(home))
        made.rename(folder)
    points: list[dict[str, Any]] = json.loads((folder / "sizes.json").read_text())["points"]
    return points


def curves(name: str, seeds: Sequence[int], out: Path, quick: bool) -> None:
    """Measure all lines of a family, write the means over the seeds, and print them."""
    family, rows = FAMILIES[name], []
    for seed in seeds:
        home = models_of(name, seed, out, quick)
        for title, line in family.lines.items():
            for point in curve(home, title, family, line):
                (score,) = point["normalised"].values()
                where = f"{point['algorithm']}, {title}"
                asked = {"line": where, "requested": point["requested"], "seed": seed}
                rows.append({**asked, "size": point["size"], "normalised": score})
    with (out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(
        f"\n{name}, seeds {', '.join(map(str, seeds))}: normalised, mean (least to most) at size\n"
    )
    print("\n".join(table(rows)))


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table with a row for each line and size."""
    lines = ["| line | asked for | size | normalised |", "| --- | --: | --: | --: |"]
    order = list(dict.fromkeys(row["line"] for row in rows))
    for line, requested in sorted(
        {(row["line"], row["requested"]) for row in rows},
        key=lambda asked: (order.index(asked[0]), asked[1]),
    ):
        some = [row for row in rows if (row["line"], row["requested"]) == (line, requested)]
        scores, size = [row["normalised"] for row in some], fmean(row["size"] for row in some)
        spread = f"{fmean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"
        lines.append(f"| {line} | {requested:g} | {size:.2f} | {spread} |")
    return lines


def joint(name: str, seeds: Sequence[int], out: Path, quick: bool) -> None:
    """Print the least squared error of pure residuals over that of groups with residuals.

    Pure: of each matrix the mean of all tasks, and residuals. Joint: of each matrix as many groups
    as FlexMerge's dendrogram may leave, their means, and residuals of their members. Both errors
    are Lagrange's bounds from below, max over prices of min (error + price (size - target)), in
    float64; triplets are small steps, so that the one of pure residuals is reached.
    """
    for seed in seeds:
        matrices = _levels(models_of(name, seed, out, quick) / MODELS, FAMILIES[name].tasks)
        whole = sum(count for count, _, _ in matrices)
        prices = torch.logspace(-12, 0, 400, dtype=torch.float64).tolist()
        least = {
            pure: [sum(_paid(*matrix, price, pure) for matrix in matrices) for price in prices]
            for pure in (True, False)
        }
        shown = []
        for size in (size for size in JOINT_SIZES if size < len(FAMILIES[name].tasks)):
            pure, both = (
                max(paid - price * size * whole for paid, price in zip(some, prices, strict=True))
                for some in least.values()
            )
            shown.append(f"{size:g}: {pure / both:.3f}")
        print(f"{name}, seed {seed}, error of pure / joint at size {', '.join(shown)}", flush=True)


def _paid(
    count: int, cost: int, levels: Sequence[tuple[int, Tensor]], price: float, pure: bool
) -> float:
    """Return the least error + price * parameters of one matrix."""
    return min(
        float(squares.clamp(max=price * cost).sum()) + price * groups * count
        for groups, squares in levels
        if groups == 1 or not pure
    )


def _levels(models: Path, tasks: Sequence[str]) -> list[tuple[int, int, list[tuple[int, Tensor]]]]:
    """Return, for each matrix, its entries, the cost of a triplet, and for every number of groups
    the squared singular values of all residuals."""
    base = load_file(models / "base/model.safetensors")
    tuned = [load_file(models / task / "model.safetensors") for task in tasks]
    found = []
    for key, start in base.items():
        if start.ndim < 2 or any(model[key].shape != start.shape for model in tuned):
            continue
        vectors = torch.stack([model[key].double() - start.double() for model in tuned]).flatten(2)
        merges = dendrogram(cosines(torch.einsum("iab,jab->ij", vectors, vectors)))
        levels = []
        for step in range(len(tasks)):
            groups = partition(merges[:step], len(tasks))
            squares = [
                _squares(vectors[task] - vectors[list(group)].mean(dim=0))
                for group in groups
                for task in group
            ]
            levels.append((len(groups), torch.cat(squares)))
        found.append((start.numel(), sum(vectors.shape[1:]), levels))
    return found


def _squares(matrix: Tensor) -> Tensor:
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return torch.linalg.eigvalsh(short @ short.mT).clamp(min=0)


def inference(quick: bool) -> None:
    """Print the time of a ViT with LoRAs on every linear layer over that of the plain one.

    One LoRA for the whole batch; and as many as images, each image with its own. Runs in turn.
    """
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=2 if quick else 6, **shape)
    plain = transformers.ViTModel(config, add_pooling_layer=False).eval()
    linear = [m.weight for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    images = torch.rand(2 if quick else 8, 3, 224, 224)
    each = [f"task{number}" for number in range(len(images))]
    for rank in RANKS:
        added = sum(rank * sum(w.shape) for w in linear) / sum(w.numel() for w in linear)
        settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        base = transformers.ViTModel(config, add_pooling_layer=False)
        lora = peft.get_peft_model(base, settings, adapter_name=each[0])
        for name in each[1:]:
            lora.add_adapter(name, settings)
        calls = (plain, lora.eval(), functools.partial(lora, adapter_names=each))
        seconds: list[list[float]] = [[], [], []]
        for run in range(1 if quick else 1 + RUNS):
            for call, spent in zip(calls, seconds, strict=True):
                started = time.process_time()
                with torch.inference_mode():
                    call(pixel_values=images)
                if run or quick:
                    spent.append(time.process_time() - started)
        print(f"rank {rank}: {added:.1%} more products; plain {median(seconds[0]):.3f} s", end="")
        for title, spent in zip(("one LoRA", f"{len(each)} LoRAs"), seconds[1:], strict=True):
            ratios = [b / a for a, b in zip(seconds[0], spent, strict=True)]
            print(
                f"; {title} {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", end=""
            )
        print(flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/residuals"), help="kept between runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parts = ("curves", "joint", "inference")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="a few steps of training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(machine.describe(), flush=True)
    for part, work in (("curves", curves), ("joint", joint)):
        for name in arguments.family if part in arguments.part else ():
            work(name, arguments.seeds, arguments.out, arguments.quick)
    if "inference" in arguments.part:
        inference(arguments.quick)


if __name__ == "__main__":
    main()
