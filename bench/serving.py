"""Batches with rows of several tasks, against one model on all rows, and one model after another.

    OMP_NUM_THREADS=1 python -m bench.serving   # a ViT with 32 to 1 rows of 8 tasks; a decoder
    python -m bench.serving --models vit --rows 8 2 1 --kinds 2 residual --seconds 60
    python -m bench.serving --quick               # tiny models, to see that it runs

Modules share what a checkpoint of that size would. In every layer the tasks are in groups of equal
size, drawn at random: not neighbours, where real groups repeat from layer to layer. Residuals and
adapters (LoRAs in PEFT, mixed by `adapter_names`) have rank 16. Runs are alternated until
`--seconds` of processor time are spent, twice at least; medians of the ratios of processor times to
one model's are shown. The ViT has 2 of its 12 layers, which are alike; the decoder has 8.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
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
        num_hidden_layers=layers,
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
                made = {key: torch.nn.Parameter(noisy(p.detach())) for key, p in made.items()}
            for task in order[group::size]:
                memos[task].update(made)
    return {task: copy.deepcopy(first, memo) for task, memo in zip(TASKS, memos, strict=True)}


def noisy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.01 * torch.randn_like(tensor)


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


def adapters(first: Any) -> PeftModel:
    """Return a PeftModel on a copy of `first` with a LoRA of each task on all linear layers."""
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(first), config, TASKS[0])
    for task in TASKS[1:]:
        model.add_adapter(task, config)
    return model.eval()


def ratios(first: Any, kind: str, call: Callable[..., Any], rows: int, seconds: float) -> str:
    """The processor times of one batch, and of one task after another, over that of one model."""
    tasks = [task for task in TASKS for _ in range(rows)]
    parts = {task: slice(n * rows, (n + 1) * rows) for n, task in enumerate(TASKS)}
    together: Any
    if kind == "adapters":
        together, names = adapters(first), {"adapter_names": tasks}
        models = dict.fromkeys(TASKS, together)
    else:
        models = residual(first) if kind == "residual" else grouped(first, int(kind))
        together, names = Batched(models), {"tasks": tasks}

    def apart() -> None:
        for task, part in parts.items():
            if kind == "adapters":
                together.set_adapter(task)
            call(models[task], part)

    def mixed() -> None:
        call(together, slice(None), **names)

    mixed()
    ways: list[Callable[[], None]] = [lambda: call(first, slice(None)), mixed, apart]
    taken: list[list[float]] = [[], [], []]
    while len(taken[0]) < 2 or sum(map(sum, taken)) < seconds:
        for way, times in zip(ways, taken, strict=True):
            started = time.process_time()
            way()
            times.append(time.process_time() - started)
    found = [[t / o for t, o in zip(times, taken[0], strict=True)] for times in taken[1:]]
    shown = (f"{statistics.median(f):5.2f} ({min(f):.2f} to {max(f):.2f})" for f in found)
    return "   ".join((*shown, f"{len(taken[0])} runs"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--models", nargs="+", default=["vit", "decoder"])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 8, 2, 1])
    parser.add_argument("--kinds", nargs="+", default=["1", "2", "4", "8", "residual", "adapters"])
    given = parser.parse_args()
    seconds = 0.0 if given.quick else given.seconds
    print(machine.describe())
    print(f"{'':<28} mixed                   one by one")
    torch.manual_seed(0)
    with torch.inference_mode():
        for model in given.models:
            make = {"vit": vit, "decoder": decoder}[model]
            first = make(given.quick, 8 if make is decoder and not given.quick else 2)
            for rows in given.rows if make is vit else (1,):
                call = (
                    images(8 * rows, first.config)
                    if make is vit
                    else prompts(8 * rows, given.quick)
                )
                for kind in given.kinds:
                    title = f"{model:<8} size {kind:<8} {rows:>2} rows"
                    print(title, ratios(first, kind, call, rows, seconds), flush=True)


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
