"""What a merge with residuals keeps of each task: its report, its cards, one line for the user."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

from mergekit_ext.flexmerge.residual import Kept
from mergekit_ext.flexmerge.storage import Size
from mergekit_ext.host.flexmerge.adapters import FOLDER, Forms
from mergekit_ext.io.model_files import may_be_hub_name
from mergekit_ext.report.card import adapters_section, residual_section, write_report
from peft_merge.adapter import LoraAdapter
from peft_merge.io.write import page

# What vLLM's --max-lora-rank may be.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_residual_report(
    folder: Path,
    method: str,
    kept: Mapping[str, Sequence[Kept]],
    tasks: Sequence[str],
    size: Size,
    seed: int,
) -> tuple[str, str]:
    """Write ``merge_report.json``; return what is said to the user, and the section of a card."""
    each = {task: [found[index] for found in kept.values()] for index, task in enumerate(tasks)}
    tensors = {
        name: dict(zip(tasks, map(_entry, found), strict=True)) for name, found in kept.items()
    }
    totals = {task: _total(found) for task, found in each.items()}
    models = {"models": size.models, "bytes": size.bytes}
    write_report(folder, method, tensors, seed, size=models, tasks=totals)
    errors = ", ".join(f"{task} {found['error']:.3g}" for task, found in totals.items())
    line = f"{size.models:.4g} models, {size.bytes:,} bytes. Relative errors: {errors}."
    return line, residual_section(totals)


def _entry(kept: Kept) -> dict[str, Any]:
    rank = {} if kept.rank is None else {"rank": kept.rank}
    return {**rank, "bytes": kept.bytes, "error": _relative(kept.left, kept.whole)}


def _total(kept: Sequence[Kept]) -> dict[str, Any]:
    ranks = sorted(each.rank for each in kept if each.rank)
    return {
        "bytes": sum(each.bytes for each in kept),
        "ranks": [ranks[0], median_low(ranks), ranks[-1]] if ranks else [],
        "error": _relative(
            math.fsum(each.left for each in kept), math.fsum(each.whole for each in kept)
        ),
    }


def _relative(left: float, whole: float) -> float:
    return math.sqrt(left / whole) if whole else 0.0


def base_card(tasks: Sequence[str], forms: Forms, base: str, source: str) -> str:
    """Return the card of the base of tasks that were trained from the model `base`.

    `source` is the text of the configuration.
    """
    known = {"base_model": base} if may_be_hub_name(base) and not os.path.isdir(base) else {}
    text = (
        f"The base of {len(tasks)} tasks, made of their fine-tunes by `decompose` of mergekit-ext. "
        "Each task is an adapter on it. Configuration, tokenizer"
        f"{' and head' if any(forms.private) else ''} are those of `{tasks[0]}`."
    )
    load = [
        f"from transformers import {forms.kinds[0]}",
        "",
        f'model = {forms.kinds[0]}.from_pretrained("base")',
    ]
    given = {**known, "library_name": "transformers"}
    return page(FOLDER, ["merge", "mergekit-ext"], [text], load, source, given)


def adapter_card(adapter: LoraAdapter, kind: str, forms: Forms) -> str:
    """Return the card of the adapter of a task, a model of the class `kind`."""
    task = adapter.name
    text = (
        f"A LoRA of {len(adapter.infos)} modules on `../{FOLDER}`: what `{task}` adds to it. "
        "`base_model_name_or_path` is where that lay at first; change it when you move both."
    )
    return page(task, ["lora", "merge", "mergekit-ext"], [text], _loading(task, kind, forms), None)


def section_of(adapters: Sequence[LoraAdapter], forms: Forms) -> str:
    """Return the section of the output's card about base and adapters."""
    tasks = [adapter.name for adapter in adapters]
    ranks = [info.configured_rank for adapter in adapters for info in adapter.infos.values()]
    fits = [rank for rank in _VLLM_RANKS if rank >= max(ranks)]
    serve = ""
    whole = bool(forms.biases) or any(adapter.saved for adapter in adapters)
    if all(kind.endswith("ForCausalLM") for kind in forms.kinds) and fits and not whole:
        named = " ".join(f"{task}={task}" for task in tasks)
        options = f"--enable-lora --max-lora-rank {fits[0]} --lora-modules {named}"
        serve = f"vllm serve {FOLDER} {options}"
    return adapters_section(FOLDER, tasks, _loading(tasks[0], forms.kinds[0], forms), serve)


def _loading(task: str, kind: str, forms: Forms) -> list[str]:
    """Return Python that loads a task from the folder above; its head may have another shape."""
    private = any(forms.private)
    head = f'config=AutoConfig.from_pretrained("{task}"), ignore_mismatched_sizes=True'
    given = f'"{FOLDER}", {head}' if private else f'"{FOLDER}"'
    return [
        "from peft import PeftModel",
        f"from transformers import {'AutoConfig, ' if private else ''}{kind}",
        "",
        f"model = {kind}.from_pretrained({given})",
        f'model = PeftModel.from_pretrained(model, "{task}")',
    ]
