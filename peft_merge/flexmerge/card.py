"""README.md of a FlexMerge, and of each task in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_merge.adapter import Adapter
from peft_merge.io.card import card as adapter_card


def card(adapters: Sequence[Adapter], report: Mapping[str, Any], config: str) -> str:
    """What the folder holds, how much it takes, how to load it."""
    size, method = report["size"], report["flexmerge"]
    rows = [
        f"| `{adapter.name}` | {len(adapter.infos)} | {_shared(adapter.name, report)} |"
        for adapter in adapters
    ]
    apart = size["unit_bytes"] * len(adapters) + size["private_bytes"]
    lines = [
        "---",
        "library_name: peft",
        "tags:",
        "- peft",
        f"- {report['kind']}",
        "- merge",
        "- mergekit-ext",
        "---",
        "",
        f"# {len(adapters)} adapters in the space of {size['adapters']:.4g}",
        "",
        f"Made with `flexmerge` (`{method['algorithm']}`) from "
        "[mergekit-ext](https://pypi.org/project/mergekit-ext). Each folder is an ordinary PEFT "
        "adapter of one task. Tasks whose changes of a module are alike have the same tensors "
        "there.",
        "",
        "| task | modules | shared with others |",
        "| --- | --- | --- |",
        *rows,
        "",
        f"Loaded together, with shared tensors, they take {size['bytes']:,} bytes instead of "
        f"{apart:,.0f}. On disk each folder is complete.",
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{adapters[0].name}")  # one task',
        "",
        "from peft_merge import load_tasks",
        "",
        'model = load_tasks(base_model, ".")  # all tasks, with shared tensors',
        f'model.set_adapter("{adapters[-1].name}")',
        "```",
        "",
        "## Merge configuration",
        "",
        "```yaml",
        config.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def task_card(adapter: Adapter, report: Mapping[str, Any]) -> str:
    """Of one task's folder."""
    said: dict[str, Any] = {}
    if _shared(adapter.name, report):
        said = {"method": "flexmerge", "adapters": report["adapters"]}
    return adapter_card(adapter, None, said)


def _shared(task: str, report: Mapping[str, Any]) -> int:
    """How many of a task's modules others have, too."""
    return sum(
        len(group["modules"])
        for block in report["blocks"]
        for group in block["groups"]
        if task in group["tasks"] and len(group["tasks"]) > 1
    )
