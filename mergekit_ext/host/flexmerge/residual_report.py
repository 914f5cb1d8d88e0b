"""What a merge with residuals keeps of each task: its report, its cards, one line for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_ext.flexmerge.residual import Kept, total
from mergekit_ext.flexmerge.storage import Size
from mergekit_ext.host.flexmerge.adapters import FOLDER, Forms
from mergekit_ext.report.card import residual_section, write_report
from peft_merge.adapter import LoraAdapter
from peft_merge.io.write import PATTERNS, page

# Of each adapter.
MOVED = (
    f"Its base is `../{FOLDER}`. `base_model_name_or_path` is where that lay at first; change it "
    "when you move both."
)
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
        name: dict(zip(tasks, (each.entry for each in found), strict=True))
        for name, found in kept.items()
    }
    totals = {task: total(found) for task, found in each.items()}
    models = {"models": size.models, "bytes": size.bytes}
    write_report(folder, method, tensors, seed, size=models, tasks=totals)
    errors = ", ".join(f"{task} {found['error']:.3g}" for task, found in totals.items())
    line = f"{size.models:.4g} models, {size.bytes:,} bytes. Relative errors: {errors}."
    return line, residual_section(totals)


def base_card(tasks: Sequence[str], forms: Forms, source: str) -> str:
    """Return the card of the base of tasks; `source` is the text of the configuration."""
    text = (
        f"The base of {len(tasks)} tasks, made of their fine-tunes by `decompose` of mergekit-ext. "
        "Each task is an adapter on it. Configuration, tokenizer"
        f"{' and head' if any(forms.private) else ''} are those of `{tasks[0]}`."
    )
    given, tags = {"library_name": "transformers"}, ["merge", "mergekit-ext"]
    load = loading(tasks[0], forms.kinds[0], forms)[1:-1]
    return page(FOLDER, tags, [text], load, source, given)


def section_of(adapters: Sequence[LoraAdapter], forms: Forms) -> str:
    """Return how to use a base and its adapters: in Python, and with a server if one takes them."""
    tasks = [adapter.name for adapter in adapters]
    parts = [
        "### Base and adapters",
        f"`{FOLDER}` is an ordinary model, and {', '.join(f'`{task}`' for task in tasks)} are PEFT "
        "LoRAs on it, with a scaling of 1. Load one with",
        "\n".join(["```python", *loading(tasks[0], forms.kinds[0], forms), "```"]),
    ]
    largest = max(info.configured_rank for each in adapters for info in each.infos.values())
    fits = [rank for rank in _VLLM_RANKS if rank >= largest]
    whole = bool(forms.biases) or any(adapter.saved for adapter in adapters)
    if all(kind.endswith("ForCausalLM") for kind in forms.kinds) and fits and not whole:
        named = " ".join(f"{task}={task}" for task in tasks)
        options = f"--enable-lora --max-lora-rank {fits[0]} --lora-modules {named}"
        parts += ["or serve all with", f"```sh\nvllm serve {FOLDER} {options}\n```"]
    if any(adapter.config["rank_pattern"] for adapter in adapters):
        parts.append(f"{PATTERNS} `uniform_rank: true` writes one rank for all of an adapter.")
    return "\n\n".join(parts)


def loading(task: str, kind: str, forms: Forms) -> list[str]:
    """Return Python that loads a task, a model of the class `kind`, from the folder above.

    Its head may have another shape.
    """
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
