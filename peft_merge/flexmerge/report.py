"""merge_report.json of a FlexMerge, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.options import Options
from peft_merge.flexmerge.target import Size
from peft_merge.report import FORMAT_VERSION


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
    return {
        "format_version": FORMAT_VERSION,
        **plan.described(),
        "flexmerge": options.described(),
        "size": described(size),
        # Upwards: each is a `target_size` that its adapters fit in.
        "sizes": [math.ceil(each.adapters * 1e6 - 1e-3) / 1e6 for each in sizes],
        "summary": _summary(blocks),
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


def _summary(blocks: Sequence[MergedBlock]) -> dict[str, Any]:
    """Modules, and ranks and truncation errors of those that are shared."""
    modules = {m for block in blocks for group in block.groups for m in group.modules}
    result: dict[str, Any] = {"modules": len(modules)}
    shared = [
        (module, details)
        for block in blocks
        for group in block.groups
        for module, details in group.modules.items()
        if "error" in details
    ]
    if shared:
        ranks = [details["rank"] for _, details in shared]
        errors = [details["error"] for _, details in shared]
        worst, details = max(shared, key=lambda item: item[1]["error"])
        result |= {
            "smallest_rank": min(ranks),
            "largest_rank": max(ranks),
            "largest_error": details["error"],
            "largest_error_in": worst,
            "mean_error": math.fsum(errors) / len(errors),
        }
    return result
