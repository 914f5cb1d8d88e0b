"""`merge_report.json`: how a merged adapter came about, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.config import saved
from peft_merge.config.plan import MergePlan

FORMAT_VERSION = 1

# Relative errors that are rounding.
NEGLIGIBLE = 1e-6


def report(
    plan: MergePlan,
    modules: Mapping[str, Mapping[str, Any]],
    coefficients: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """All that is known of a merge, and nothing of the run: a file of it is always the same.

    Args:
        modules: what was reported of each: `rank`, `error`, the rule's details.
        coefficients: NAN's, of each adapter in each module; empty without NAN.
    """
    names = [adapter.name for adapter in plan.adapters]
    entries = {}
    for module, details in modules.items():
        entry: dict[str, Any] = {
            "weights": dict(zip(names, plan.resolve.weights(module), strict=True))
        }
        if module in coefficients:
            entry["coefficients"] = dict(zip(names, coefficients[module], strict=True))
        if plan.kind == "lora":
            entry["ranks"] = _ranks(plan.adapters, module)
        entries[module] = {**entry, **details}
    return {
        "format_version": FORMAT_VERSION,
        **plan.described(),
        "summary": _summary(modules),
        "modules": entries,
        "whole_tensors": saved.summary(plan.saved, plan.adapters),
        "notes": list(plan.notes),
    }


def _ranks(adapters: Sequence[Adapter], module: str) -> dict[str, int]:
    return {
        adapter.name: adapter.infos[module].rank
        for adapter in adapters
        if isinstance(adapter, LoraAdapter) and module in adapter.infos
    }


def _summary(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ranks and relative truncation errors over all modules; LoRAs have them."""
    result: dict[str, Any] = {"modules": len(modules)}
    ranks = [m["rank"] for m in modules.values() if "rank" in m]
    errors = {name: m["error"] for name, m in modules.items() if "error" in m}
    if ranks:
        result |= {"smallest_rank": min(ranks), "largest_rank": max(ranks)}
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        result |= {
            "largest_error": errors[worst],
            "largest_error_in": worst,
            "mean_error": math.fsum(errors.values()) / len(errors),
        }
    return result


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """What a user should know of a finished merge."""
    summary = report["summary"]
    line = f"{report['method']}: {len(report['adapters'])} adapters, {summary['modules']} modules"
    if "largest_rank" in summary:
        low, high = summary["smallest_rank"], summary["largest_rank"]
        line += f", rank {high}" if low == high else f", ranks {low} to {high}"
    yield f"{line}."
    if summary.get("largest_error", 0) > NEGLIGIBLE:
        yield (
            f"Cutting off the rank changed the merged weights by {summary['mean_error']:.2%} on "
            f"average, at most {summary['largest_error']:.2%} ({summary['largest_error_in']})."
        )
    yield from report["notes"]
