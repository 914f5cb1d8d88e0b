"""Adapters written as PEFT's save_pretrained would, with a card, and checked."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.core.parameters import Values
from mergekit_ext.errors import MergeError
from mergekit_ext.io.model_files import may_be_hub_name
from mergekit_ext.io.staging import new_folder
from mergekit_ext.report.card import CARD, REPORT_NAME, method_section
from peft_merge.adapter import Adapter, LoraAdapter, VectorInfo
from peft_merge.io import names
from peft_merge.io.diffusers_lora import FILE, is_of_diffusers
from peft_merge.io.parse import BIAS, VECTOR, factor_keys
from peft_merge.io.read import CONFIG, SAFETENSORS, load_adapter

MERGE_CONFIG = "merge_config.yml"
PROJECT = "`mergekit-ext`"


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    merge_config: str | None = None,
    report: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write an adapter's folder: it appears complete and checked, or not at all.

    The folder is written beside `path`, read again (names, shapes, scalings, finite values), and
    then renamed.

    Args:
        adapter: as read, or merged.
        path: a folder that does not exist or is empty.
        merge_config: for merge_config.yml.
        report: JSON values for merge_report.json.
        card: the text of README.md; one is made if it is None.

    Raises:
        ConfigError: there is something at `path`, or it cannot be written.
        NonFiniteError: a tensor overflowed in the dtype in which it is to be stored.

    Example:
        >>> peft_merge.save_adapter(peft_merge.load_adapter("lora"), "copy")
    """
    texts = {CARD: card_of(adapter, merge_config, report) if card is None else card}
    if merge_config is not None:
        texts[MERGE_CONFIG] = merge_config
    if report is not None:
        texts[REPORT_NAME] = json.dumps(report, indent=2)
    with new_folder(path, f"writing the adapter {adapter.name}") as folder:
        fill_folder(adapter, folder, texts)


def fill_folder(adapter: Adapter, folder: Path, texts: Mapping[str, str]) -> None:
    """Write an adapter's files, and further texts, into an empty folder, and check the adapter."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored, name, configs = state_dict(adapter), SAFETENSORS, {CONFIG: adapter.config}
    if is_of_diffusers(adapter):
        stored = {key.removeprefix(names.PREFIX): tensor for key, tensor in stored.items()}
        name, configs = FILE, {}
    try:
        save_file(stored, folder / name, {"format": "pt"})
    except SafetensorError as error:  # raised for a full disk
        raise OSError(str(error)) from error
    made = {name: json.dumps(each, indent=2, sort_keys=True) for name, each in configs.items()}
    for name, text in {**made, **texts}.items():
        (folder / name).write_text(text.rstrip() + "\n", encoding="utf-8")
    again = load_adapter(folder, name=adapter.name)
    modules = {*adapter.infos, *again.infos}
    unlike = {m for m in modules if adapter.infos.get(m) != again.infos.get(m)}
    unlike |= {m for m in modules - unlike if not _same(adapter, again, m)}
    different = [*sorted(unlike), *sorted(set(adapter.saved) ^ set(again.saved))]
    if different:
        raise MergeError(
            f"{adapter.name}: {', '.join(different[:5])} read differently from what was to be "
            f"written ({len(different)} in all); the configuration does not describe the tensors."
        )


def _same(adapter: Adapter, again: Adapter, module: str) -> bool:
    first: Any = adapter.load(module)
    second: Any = again.load(module)
    if isinstance(first, Tensor):
        return torch.equal(first.cpu(), second)
    return abs(first.scale - second.scale) <= 1e-9 * abs(first.scale)


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Return all tensors of an adapter under the names of PEFT's files, on the CPU, contiguous."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in _named(adapter):
        tensor = value.detach().to("cpu").contiguous()
        # safetensors takes no two tensors that share memory.
        start = tensor.untyped_storage().data_ptr()
        if start in seen:
            tensor = tensor.clone()
        seen.add(start)
        stored[names.PREFIX + name] = tensor
    return stored


def _named(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for module, info in adapter.infos.items():
        value: Any = adapter.load(module)
        if isinstance(info, VectorInfo):
            yield f"{module}.{VECTOR}", value
            continue
        factors = info.store(value.a, value.b)
        for key, factor in zip(factor_keys(info.layout), factors, strict=True):
            yield f"{module}.{key}", factor
        if value.bias is not None:
            yield f"{module}.{BIAS}", value.bias
    for name, load in adapter.saved.items():
        yield names.stored(name, adapter.infos), load()


# Of adapters whose ranks differ, and of those that hold more than factors (docs/serving.md).
PATTERNS = (
    "Ranks may differ between modules (`rank_pattern`, `alpha_pattern`), which PEFT and vLLM read: "
    "llama.cpp scales such modules wrongly, and SGLang refuses them."
)
WHOLE = (
    "Whole tensors (`modules_to_save`) or biases are beside the factors: vLLM refuses them, and "
    "PEFT's batches of several adapters the adapters without these modules (docs/batches.md)."
)


def notes_of(adapter: Adapter) -> list[str]:
    """Return what other software than PEFT does not read of a LoRA."""
    if not isinstance(adapter, LoraAdapter) or is_of_diffusers(adapter):
        return []
    patterned = any(adapter.config.get(key) for key in ("rank_pattern", "alpha_pattern"))
    more = adapter.saved or any(info.bias for info in adapter.infos.values())
    return [PATTERNS] * bool(patterned) + [WHOLE] * bool(more)


def card_of(
    adapter: Adapter, merge_config: str | None, report: Values | None, example: Sequence[str] = ()
) -> str:
    """Return README.md: metadata as the Hub wants it, what was merged, and how to load it."""
    kind, tag = ("LoRA", "lora") if isinstance(adapter, LoraAdapter) else ("(IA)³", "ia3")
    metadata, further, shown = of_base(adapter.config.get("base_model_name_or_path"))
    report = report or {}
    merged = "model" not in report
    made = "merged" if merged else f"extracted from its fine-tune `{report['model']}`"
    tags = ["peft", tag, *(["merge"] if merged else []), "mergekit-ext", *further]
    paragraphs = [f"A {kind} adapter of {shown}, {made}, made with `peft-merge` from {PROJECT}."]
    if "method" in report:
        paragraphs.append(f"Method: `{report['method']}`.")
    if isinstance(inputs := report.get("adapters"), (list, tuple)):
        called = [item.get("name", item) if isinstance(item, Mapping) else item for item in inputs]
        paragraphs += ["Merged adapters:", "\n".join(f"- {name}" for name in called)]
    paragraphs += dict.fromkeys([*map(str, report.get("notes") or ()), *notes_of(adapter)])
    paragraphs.append(method_section(report.get("in_effect", ""), report.get("paper") or ""))
    if is_of_diffusers(adapter):
        tags[0] = metadata["library_name"] = "diffusers"
        example = [f'pipeline.load_lora_weights("{adapter.name}")']
    load = f'model = PeftModel.from_pretrained(base_model, "{adapter.name}")'
    example = example or ["from peft import PeftModel", "", load]
    return page(adapter.name, tags, paragraphs, example, merge_config, metadata)


def of_base(base: Any) -> tuple[dict[str, Any], list[str], str]:
    """Return metadata and tags for a base, and its name; the Hub refuses folders of one machine."""
    if not may_be_hub_name(base):
        return {}, [], "its base model"
    fields = {"base_model": base, "base_model_relation": "adapter"}
    return fields, [f"base_model:adapter:{base}"], f"`{base}`"


def page(
    title: str,
    tags: Sequence[str],
    paragraphs: Sequence[str],
    example: Sequence[str],
    config: str | None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Return a card as Markdown; `metadata` are further fields of `ModelCardData`."""
    from huggingface_hub import ModelCardData

    fields = {"library_name": "peft", "tags": list(tags), **(metadata or {})}
    header = ModelCardData(**fields).to_yaml()
    parts = [f"---\n{header}\n---", f"# {title}", *filter(None, paragraphs)]
    parts += ["## Use", "\n".join(["```python", *example, "```"])]
    if config is not None:
        parts += ["## Merge configuration", f"```yaml\n{config.strip()}\n```"]
    return "\n\n".join(parts) + "\n"
