"""merge_report.json of a FlexMerge, as JSON values, and README.md of it and of its tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_ext.report.card import table
from peft_merge.adapter import Adapter
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.options import Options
from peft_merge.flexmerge.target import Size
from peft_merge.io.card import PROJECT, page
from peft_merge.io.card import card as adapter_card
from peft_merge.report import FORMAT_VERSION, summary


@dataclass(frozen=True)
class MergedGroup:
    """Tasks that share a block, and for each of its modules what the merge says of it."""

    tasks: tuple[int, ...]
    similarity: float | None
    modules: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class MergedBlock:
    """A block and its groups."""

    name: str
    groups: tuple[MergedGroup, ...]


def report(
    plan: MergePlan,
    options: Options,
    blocks: Sequence[MergedBlock],
    similarities: Sequence[Tensor],
    sizes: Sequence[Size],
    step: int,
) -> dict[str, Any]:
    """All that is known of a merge, and nothing of the run: a file of it is always the same.

    Args:
        similarities: of each block, (m, m).
        sizes: before the first merge and after each.
        step: how many merges were done.
    """
    names = [adapter.name for adapter in plan.adapters]
    size = sizes[step]
    merged = [item for block in blocks for group in block.groups for item in group.modules.items()]
    shared = [(module, entry) for module, entry in merged if "error" in entry]
    return {
        "format_version": FORMAT_VERSION,
        **plan.described(),
        "flexmerge": options.described(),
        "size": described(size),
        # Upwards: each is a `target_size` that its adapters fit in.
        "sizes": [math.ceil(each.adapters * 1e6 - 1e-3) / 1e6 for each in sizes],
        "summary": summary(len({module for module, _ in merged}), shared),
        "blocks": [
            {
                "name": block.name,
                "groups": [
                    {
                        "tasks": [names[task] for task in group.tasks],
                        "similarity": group.similarity,
                        "modules": dict(group.modules),
                    }
                    for group in block.groups
                ],
                "similarities": cosines.tolist(),
            }
            for block, cosines in zip(blocks, similarities, strict=True)
        ],
        "notes": [*plan.notes, _note(size, len(names))],
    }


def described(size: Size) -> dict[str, Any]:
    """A size as JSON values."""
    return {
        "adapters": size.adapters,
        "bytes": size.bytes,
        "unit_bytes": size.unit_bytes,
        "private_bytes": size.private_bytes,
    }


def _note(size: Size, count: int) -> str:
    apart = size.unit_bytes * count + size.private_bytes
    return (
        f"{count} adapters in the space of {size.adapters:.4g}: {size.bytes:,} bytes when their "
        f"tensors are shared (peft_merge.load_tasks), instead of {apart:,.0f}. Each folder is a "
        "whole adapter."
    )


def card(adapters: Sequence[Adapter], report: Mapping[str, Any], config: str) -> str:
    """Return README.md: what the folder holds, how much it takes, how to load it."""
    size, method = report["size"], report["flexmerge"]
    rows = [
        [f"`{adapter.name}`", str(len(adapter.infos)), str(_shared(adapter.name, report))]
        for adapter in adapters
    ]
    apart = size["unit_bytes"] * len(adapters) + size["private_bytes"]
    return page(
        f"{len(adapters)} adapters in the space of {size['adapters']:.4g}",
        ["peft", report["kind"], "merge", "mergekit-ext"],
        [
            f"Made with `flexmerge` (`{method['algorithm']}`) from {PROJECT}. Each folder is an "
            "ordinary PEFT adapter of one task. Tasks whose changes of a module are alike have "
            "the same tensors there.",
            table(["task", "modules", "shared with others"], rows),
            f"Loaded together, with shared tensors, they take {size['bytes']:,} bytes instead of "
            f"{apart:,.0f}. On disk each folder is complete.",
        ],
        [
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(base_model, "{adapters[0].name}")  # one task',
            "",
            "from peft_merge import load_tasks",
            "",
            'model = load_tasks(base_model, ".")  # all tasks, with shared tensors',
            f'model.set_adapter("{adapters[-1].name}")',
        ],
        config,
    )


def task_card(adapter: Adapter, report: Mapping[str, Any]) -> str:
    """Return README.md of one task's folder."""
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
