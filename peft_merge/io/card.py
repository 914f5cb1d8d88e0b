"""The model card of a merged adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ext.io.model_files import may_be_hub_name
from peft_merge.adapter import Adapter, LoraAdapter

PROJECT = "[mergekit-ext](https://pypi.org/project/mergekit-ext)"


def card(adapter: Adapter, merge_config: str | None, report: Mapping[str, Any] | None) -> str:
    """Return README.md: metadata as the Hub wants it, what was merged, and how to load it.

    `base_model_relation` is ``adapter``, the one of the Hub's values (adapter, merge, quantized,
    finetune) that says what this is to its base. Folders of one machine mean nothing there, and
    the Hub refuses them.
    """
    lora = isinstance(adapter, LoraAdapter)
    base = adapter.config.get("base_model_name_or_path")
    tags = ["peft", "lora" if lora else "ia3", "merge", "mergekit-ext"]
    metadata: dict[str, Any] = {}
    shown = "its base model"
    if may_be_hub_name(base):
        metadata = {"base_model": base, "base_model_relation": "adapter"}
        tags.append(f"base_model:adapter:{base}")
        shown = f"`{base}`"
    kind = "LoRA" if lora else "(IA)³"
    paragraphs = [f"A merged {kind} adapter of {shown}, made with `peft-merge` from {PROJECT}."]
    method, adapters = (report or {}).get("method"), (report or {}).get("adapters")
    if isinstance(method, str):
        paragraphs.append(f"Method: `{method}`.")
    if isinstance(adapters, (list, tuple, dict)) and adapters:
        paragraphs += ["Merged adapters:", "\n".join(f"- {_name(merged)}" for merged in adapters)]
    example = [
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{adapter.name}")',
    ]
    return page(adapter.name, tags, paragraphs, example, merge_config, metadata)


def page(
    title: str,
    tags: Sequence[str],
    paragraphs: Sequence[str],
    example: Sequence[str],
    config: str | None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Return a card as Markdown.

    Args:
        title: its heading.
        tags: for the Hub.
        paragraphs: what the folder holds.
        example: lines of Python that load it.
        config: the merge configuration, if it is shown.
        metadata: further fields of `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    header = ModelCardData(library_name="peft", tags=list(tags), **(metadata or {})).to_yaml()
    parts = [f"---\n{header}\n---", f"# {title}", *paragraphs]
    parts += ["## Use", "\n".join(["```python", *example, "```"])]
    if config is not None:
        parts += ["## Merge configuration", f"```yaml\n{config.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _name(adapter: Any) -> str:
    return str(adapter.get("name", adapter)) if isinstance(adapter, Mapping) else str(adapter)
