"""The model card of a merged adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft_merge.adapter import Adapter, LoraAdapter

# A name on the Hub; folders of one machine mean nothing there, and the Hub refuses them.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def card(adapter: Adapter, merge_config: str | None, report: Mapping[str, Any] | None) -> str:
    """README.md: metadata as the Hub wants it, what was merged, and how to load it.

    `base_model_relation` is ``adapter``, the one of the Hub's values (adapter, merge, quantized,
    finetune) that says what this is to its base.
    """
    from huggingface_hub import ModelCardData

    lora = isinstance(adapter, LoraAdapter)
    base = adapter.config.get("base_model_name_or_path")
    on_hub = isinstance(base, str) and _HUB_NAME.fullmatch(base) is not None
    tags = ["peft", "lora" if lora else "ia3", "merge", "mergekit-ext"]
    metadata: dict[str, Any] = {"library_name": "peft"}
    if on_hub:
        metadata |= {"base_model": base, "base_model_relation": "adapter"}
        tags.append(f"base_model:adapter:{base}")
    header = ModelCardData(**metadata, tags=tags).to_yaml()
    kind = "LoRA" if lora else "(IA)³"
    shown = f"`{base}`" if on_hub else "its base model"
    lines = [
        "---",
        header,
        "---",
        "",
        f"# {adapter.name}",
        "",
        f"A merged {kind} adapter of {shown}, made with `peft-merge` from "
        "[mergekit-ext](https://pypi.org/project/mergekit-ext).",
        "",
    ]
    lines += _merged(report or {})
    lines += [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{adapter.name}")',
        "```",
        "",
    ]
    if merge_config is not None:
        lines += ["## Merge configuration", "", "```yaml", merge_config.strip(), "```", ""]
    return "\n".join(lines)


def _merged(report: Mapping[str, Any]) -> list[str]:
    method, adapters = report.get("method"), report.get("adapters")
    lines = []
    if isinstance(method, str):
        lines += [f"Method: `{method}`.", ""]
    if isinstance(adapters, (list, tuple, dict)) and adapters:
        lines += ["Merged adapters:", "", *(f"- {_name(adapter)}" for adapter in adapters), ""]
    return lines


def _name(adapter: Any) -> str:
    return str(adapter.get("name", adapter)) if isinstance(adapter, Mapping) else str(adapter)
