"""Batches with rows of several tasks, against one model on all rows, and one model after another.

    python -m bench.serving              # ViT-B/32's shape, 8 tasks, 32 to 1 rows each; a decoder
    python -m bench.serving --layers 3 --rows 8 2 1 --kinds 2 residual
    python -m bench.serving --quick      # tiny models, to see that it runs

Modules share what a checkpoint of that size would. In every layer the tasks are in groups of equal
size, drawn at random: not neighbours, where real groups repeat from layer to layer. Runs are
alternated; medians of the ratios to one model's time are shown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from bench import machine
from mergekit_ext.flexmerge import Batched
from mergekit_ext.flexmerge.factored import Factored, leave_factors

TASKS = [f"task{number}" for number in range(8)]
RANK = 16


def vit(quick: bool, layers: int) -> Any:
    small = {"hidden_size": 48, "intermediate_size": 96, "image_size": 64} if quick else {}
    config = ViTConfig(patch_size=32, num_labels=10, num_hidden_layers=layers, **small)
    return ViTForImageClassification(config).eval()


def decoder(quick: bool, layers: int) -> Any:
    width = 64 if quick else 512
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=min(layers, 8),
        num_attention_heads=8,
    )
    return LlamaForCausalLM(config).eval()


def grouped(first: Any, size: int) -> dict[str, Any]:
    """Modules that share `first`'s parameters in groups; each layer has `size` of them."""
    memos: list[dict[int, Any]] = [{} for _ in TASKS]
    for module in first.modules():
        order = torch.randperm(len(TASKS)).tolist()
        for group in range(size):
            made = {id(p): p for p in module._parameters.values() if p is not None}
            if group:
                made = {key: torch.nn.Parameter(p.detach().clone()) for key, p in made.items()}
            for task in order[group::size]:
                memos[task].update(made)
    return {task: copy.deepcopy(first, memo) for task, memo in zip(TASKS, memos, strict=True)}


def residual(first: Any) -> dict[str, Any]:
    """Modules that share `first`'s matrices, with factors and small tensors of their own."""
    made = {}
    for task in TASKS:
        memo: dict[int, Any] = {}
        for parameter in first.parameters():
            own = torch.nn.Parameter(parameter.detach().clone())
            if parameter.dim() > 1:
                rows, columns = len(parameter), parameter[0].numel()
                b, a = torch.randn(rows, RANK), 0.01 * torch.randn(RANK, columns)
                own = torch.nn.Parameter(Factored.of(parameter.detach(), b, a))
            memo[id(parameter)] = own
        made[task] = copy.deepcopy(first, memo)
        leave_factors(made[task])
    return made


def ratios(
    first: Any, models: dict[str, Any], call: Callable[..., Any], rows: int, runs: int
) -> str:
    """The times of one batch, and of one task after another, over that of one model."""
    together, tasks = Batched(models), [task for task in TASKS for _ in range(rows)]

    def views() -> None:
        for number, model in enumerate(models.values()):
            call(model, slice(number * rows, (number + 1) * rows))

    ways: list[Callable[[], object]] = [
        lambda: call(first, slice(None)),
        lambda: call(together, slice(None), tasks=tasks),
        views,
    ]
    seconds: list[list[float]] = [[], [], []]
    for _ in range(runs + 1):
        for way, taken in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            way()
            taken.append(time.perf_counter() - started)
    one, mixed, apart = (taken[1:] for taken in seconds)
    mixed_ratio = statistics.median(m / o for m, o in zip(mixed, one, strict=True))
    apart_ratio = statistics.median(a / o for a, o in zip(apart, one, strict=True))
    return f"{mixed_ratio:5.2f} {apart_ratio:9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 8, 2, 1])
    parser.add_argument("--kinds", nargs="+", default=["1", "2", "4", "8", "residual"])
    given = parser.parse_args()
    print(machine.describe())
    print(f"{'':<28} mixed one by one")
    torch.manual_seed(0)
    with torch.inference_mode():
        for make in (vit, decoder):
            first = make(given.quick, 2 if given.quick else given.layers)
            for kind in given.kinds:
                models = residual(first) if kind == "residual" else grouped(first, int(kind))
                for rows in given.rows if make is vit else (1,):
                    call = (
                        images(8 * rows, first.config)
                        if make is vit
                        else prompts(8 * rows, given.quick)
                    )
                    print(
                        f"{make.__name__:<8} size {kind:<8} {rows:>2} rows",
                        ratios(first, models, call, rows, given.runs),
                        flush=True,
                    )


def images(count: int, config: Any) -> Callable[..., Any]:
    inputs = torch.randn(count, 3, config.image_size, config.image_size)
    return lambda model, rows, **tasks: model(pixel_values=inputs[rows], **tasks)


def prompts(count: int, quick: bool) -> Callable[..., Any]:
    ids, new = torch.randint(3, 4096, (count, 16)), 4 if quick else 64
    return lambda model, rows, **tasks: model.generate(
        input_ids=ids[rows],
        attention_mask=torch.ones_like(ids[rows]),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **tasks,
    )


if __name__ == "__main__":
    main()
