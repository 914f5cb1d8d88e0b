"""How far a merge over a base should go: accuracy against rho, and rules that find rho from norms.

    python -m bench.scales --out out/residuals               # the models of `bench.residuals`
    python -m bench.scales --family snapshots --seeds 0
    python -m bench.scales --quick                           # a few steps, to see that it runs

rho is the norm of the merged task vector over the mean norm of its inputs. Each method's vector is
multiplied so that rho takes a grid of values, over the whole model and in each tensor by itself;
so are the values that rules find from norms: ``auto``, that of `mergekit_ext.kernels.calibration`,
and ``at least 0.75``, the average's if it is more. Printed are means over the tasks of the test
accuracy over that of the task's own model.

Families: ``vit``, eight tasks, ``vit4``, four of them, and ``bert``, three, of `bench.residuals`;
``snapshots``, five of one run on digits.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file
from torch import Tensor

import mergekit_ext
from bench.residuals import FAMILIES, MODELS, models_of
from examples.flexmerge.data import load_tasks
from examples.flexmerge.evaluate import evaluate as score_vit
from examples.quickstart.train import BATCH, new_model, pretrain
from examples.quickstart.train import QUICK as SCHEDULE

GRID = (0.45, 0.6, 0.75, 0.9, 1.05, 1.2, 1.5, 2.0)
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 1.0},
    "nan": {"scale": "paper"},
    "ties": {"weight": 1.0, "density": 0.2},
    "nan_ties": {"density": 0.2, "scale": "paper"},
    "lore": {"mu_relative": 0.1, "lambda": 1.0},
    "pcb": {},
    "tsv_m": {},
}
ORTHOGONAL = ("tsv_m",)  # put the parts of tasks side by side
FOUR = ("digit", "rotation", "scene", "place")
SNAPSHOTS, EVERY, LR = 5, 25, 3e-4
Vectors = dict[str, Tensor]
Score = Callable[[Vectors], float]


def norm(vectors: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(v.double().norm()) for v in vectors.values()))


class Tuned:
    """Task vectors over a base, and the score of a merged one."""

    def __init__(self, base: Vectors, models: Mapping[str, Vectors], score: Score):
        self.base, self.models, self.score = base, models, score
        self.deltas = [{k: m[k] - base[k] for k in base} for m in models.values()]

    def merged(self, method: str, parameters: Mapping[str, Any]) -> Vectors:
        inputs = {"base": self.base, **self.models}
        found = merge_state_dicts(inputs, method, parameters=parameters, base="base")
        return {name: found[name] - self.base[name] for name in self.base}

    def at(self, vector: Vectors) -> float:
        return self.score({name: self.base[name] + v for name, v in vector.items()})

    def rules(self, names: Sequence[str], orthogonal: bool) -> dict[str, float]:
        """Return what each rule says rho should be, over some tensors."""
        part = [{n: d[n] for n in names} for d in self.deltas]
        mean = fmean(map(norm, part)) or 1.0
        common = norm({n: sum(d[n] for d in part) / len(part) for n in names}) / mean
        times = math.sqrt(len(part)) if orthogonal else 1.0
        return {
            "at least 0.75": times * max(0.75, common),
            "auto": times * math.sqrt((1 + common**2) / 2),
        }

    def scaled(
        self, vector: Vectors, rho: Callable[[Sequence[str]], float], whole: bool
    ) -> Vectors:
        out = {}
        for names in [list(vector)] if whole else [[name] for name in vector]:
            mean = fmean(norm({n: d[n] for n in names}) for d in self.deltas)
            size = norm({n: vector[n] for n in names})
            factor = rho(names) * mean / size if size else 0.0
            out.update({n: vector[n] * factor for n in names})
        return out


def tuned(home: Path, tasks: Sequence[str], score: Callable[[Any, str], Any]) -> Tuned:
    """Read the models of tasks; heads stay each task's own."""
    read = {t: load_file(home / MODELS / t / "model.safetensors") for t in ("base", *tasks)}
    shared = [
        name
        for name, tensor in read["base"].items()
        if "classifier" not in name
        and tensor.is_floating_point()
        and all(m[name].shape == tensor.shape for m in read.values())
    ]
    kept = {t: {name: m[name].float() for name in shared} for t, m in read.items()}
    cls = transformers.ViTForImageClassification if "vit" in home.name else transformers.BertModel
    modules = {task: cls.from_pretrained(home / MODELS / task).eval() for task in tasks}

    def value(module: Any, task: str) -> float:
        found = score(module, task)
        return found["accuracy"] if isinstance(found, Mapping) else float(found)

    own = {task: value(modules[task], task) for task in tasks}

    def mean(weights: Vectors) -> float:
        found = []
        for task, module in modules.items():
            module.load_state_dict(weights, strict=False)
            found.append(value(module, task) / own[task])
        return fmean(found)

    return Tuned(kept.pop("base"), kept, mean)


def snapshots(seed: int, quick: bool) -> Tuned:
    """Fine-tune one model on digits, and keep some of its states."""
    tasks, every = load_tasks(), 2 if quick else EVERY
    digit = tasks["digit"]
    model = new_model(list(tasks.values()), seed)
    pretrain(model, [tasks[name] for name in FOUR], SCHEDULE, seed)
    kept = [copy.deepcopy(model.state_dict())]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.vit.parameters(), LR)
    data = digit.splits["train"]
    model.train()
    for step in range(1, (SNAPSHOTS + 2) * every + 1):
        rows = torch.randint(len(data), (BATCH,), generator=generator)
        logits = model(pixel_values=data.images[rows]).logits[:, digit.classes]
        loss = torch.nn.functional.cross_entropy(logits, data.labels[rows] - digit.offset)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        if step > 2 * every and step % every == 0:
            kept.append(copy.deepcopy(model.state_dict()))
    model.eval()
    test = digit.splits["test"]

    @torch.no_grad()
    def accuracy(weights: Vectors) -> float:
        model.load_state_dict(weights, strict=False)
        logits = model(pixel_values=test.images).logits[:, digit.classes]
        return float((logits.argmax(dim=1) + digit.offset == test.labels).float().mean())

    last = accuracy(kept[-1])
    print(f"snapshots: accuracy of each {[round(accuracy(k), 3) for k in kept]}")
    names = [name for name in kept[0] if "classifier" not in name]
    base, *models = [{name: state[name] for name in names} for state in kept]
    return Tuned(base, dict(enumerate(models)), lambda weights: accuracy(weights) / last)


def family(name: str, seed: int, out: Path, quick: bool) -> Tuned:
    if name == "snapshots":
        return snapshots(seed, quick)
    kind = "bert" if name == "bert" else "vit"
    home = models_of(kind, seed, out, quick)
    tasks = FOUR if name == "vit4" else FAMILIES[kind].tasks
    return tuned(home, tasks, FAMILIES[kind].evaluate(home) if kind == "bert" else score_vit)


def study(name: str, found: Tuned, methods: Sequence[str]) -> None:
    """Print one table."""
    names = list(found.base)
    rules = found.rules(names, False)
    print(f"\n{name}: rho by each rule, whole model: ", {k: round(v, 3) for k, v in rules.items()})
    average = {n: sum(d[n] for d in found.deltas) / len(found.deltas) for n in names}
    print(f"average: {found.at(average):.4f}", flush=True)
    for method in methods:
        vector = found.merged(method, METHODS[method])
        mean = fmean(map(norm, found.deltas))
        print(f"{method}: as it is {found.at(vector):.4f} at rho {norm(vector) / mean:.3f}")
        for whole in (True, False):
            where = "model " if whole else "tensor"
            line = [found.at(found.scaled(vector, lambda _, r=r: r, whole)) for r in GRID]
            print(
                f"  {where} "
                + "  ".join(f"{r:g}: {x:.3f}" for r, x in zip(GRID, line, strict=True))
            )
            ruled = {
                rule: found.at(
                    found.scaled(
                        vector,
                        lambda n, k=rule, o=method in ORTHOGONAL: found.rules(n, o)[k],
                        whole,
                    )
                )
                for rule in rules
            }
            print(f"  {where} " + "  ".join(f"{k}: {x:.3f}" for k, x in ruled.items()), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scales")
    parser.add_argument("--out", type=Path, default=Path("out/residuals"))
    parser.add_argument("--family", nargs="+", default=["vit4", "vit", "bert", "snapshots"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    mergekit_ext.register()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(True)
    for seed in options.seeds:
        for name in options.family:
            found = family(name, seed, options.out, options.quick)
            with torch.no_grad():
                study(f"{name}, seed {seed}", found, options.methods)


if __name__ == "__main__":
    main()
