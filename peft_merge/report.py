"""Words and tables about a merge: a look ahead (`--check`), merge_report.json, a summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit_ext.core import memory
from peft_merge.adapter import Adapter, LoraAdapter, one_rank
from peft_merge.config.plan import MergePlan
from peft_merge.saved import saved_names

FORMAT_VERSION = 1

# Relative errors that are rounding.
NEGLIGIBLE = 1e-6


def report(
    plan: MergePlan,
    modules: Mapping[str, Mapping[str, Any]],
    coefficients: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return all that is known of a merge, as JSON values; nothing of the run, so that it repeats.

    Args:
        modules: the report of each: `rank`, `error`, the rule's details.
        coefficients: NAN's, of each adapter in each module; empty without NAN.
    """
    names = [adapter.name for adapter in plan.adapters]
    entries = {}
    for module, details in modules.items():
        weights = plan.resolve.weights(module)
        entry: dict[str, Any] = {"weights": dict(zip(names, weights, strict=True))}
        if module in coefficients:
            entry["coefficients"] = dict(zip(names, coefficients[module], strict=True))
        if plan.kind == "lora":
            entry["ranks"] = {name: info.rank for name, info in plan.infos(module).items()}
        entries[module] = {**entry, **details}
    return {
        "format_version": FORMAT_VERSION,
        **plan.described(),
        "summary": summary(len(modules), modules.items()),
        "modules": entries,
        "whole_tensors": {  # from which adapters; [] when dropped
            name: [names[position] for position in plan.saved.get(name, ())]
            for name in saved_names(plan.adapters)
        },
        "notes": list(plan.notes),
    }


def summary(count: int, merged: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the ranks and relative truncation errors over merged modules; LoRAs have them.

    Args:
        count: how many modules there are.
        merged: the report of each, by its name.
    """
    result: dict[str, Any] = {"modules": count}
    entries = list(merged)
    ranks = [entry["rank"] for _, entry in entries if "rank" in entry]
    errors = [(entry["error"], name) for name, entry in entries if "error" in entry]
    if ranks:
        result |= {"smallest_rank": min(ranks), "largest_rank": max(ranks)}
    if errors:
        largest, worst = max(errors, key=lambda found: found[0])
        result |= {
            "largest_error": largest,
            "largest_error_in": worst,
            "mean_error": math.fsum(error for error, _ in errors) / len(errors),
        }
    return result


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a user should know of a finished merge."""
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


def preview(plan: MergePlan) -> str:
    """Return some lines of text about a merge that can start."""
    shared = sum(len(plan.infos(module)) == len(plan.adapters) for module in plan.modules)
    lines = [
        "No problems.",
        "",
        *_table(plan.adapters),
        "",
        f"Method:  {plan.request.method} (space: {plan.space})",
        f"Modules: {len(plan.modules)}, {shared} of them in all adapters",
    ]
    if plan.rule is not None:
        if names := saved_names(plan.adapters):
            lines.append(f"Whole:   {len(plan.saved)} of {len(names)} tensors kept")
        lines.append(f"Output:  {_output(plan)}")
    lines += [f"Note: {note}" for note in (*plan.notes, *map(str, plan.forewarnings))]
    return "\n".join(lines)


def _table(adapters: Sequence[Adapter]) -> Iterator[str]:
    rows = [("adapter", "kind", "rank", "modules", "whole tensors", "dtype")]
    for adapter in adapters:
        kind, rank = "(IA)^3", "-"
        if isinstance(adapter, LoraAdapter):
            ranks = {info.rank for info in adapter.infos.values()}
            kind, rank = "LoRA", " to ".join(map(str, sorted({min(ranks), max(ranks)})))
        dtypes = sorted({_short(info.dtype) for info in adapter.infos.values()})
        counts = (str(len(adapter.infos)), str(len(adapter.saved)))
        rows.append((adapter.name, kind, rank, *counts, ", ".join(dtypes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _output(plan: MergePlan) -> str:
    def size(patterns: bool) -> str:
        count = plan.numbers(patterns=patterns)
        return f"{memory.size(count * plan.dtype.itemsize)} of {_short(plan.dtype)}"

    if plan.kind == "ia3":
        return f"{plan.numbers(patterns=False):,} numbers, {size(False)}"
    bound = "" if isinstance(plan.rank, int) else "at most "
    if plan.patterns:
        return f"{bound}rank {max(map(plan.largest_rank, plan.modules))}, {size(True)}"
    apart = "" if size(True) == size(False) else f" ({bound}{size(True)} with `patterns: true`)"
    rank = one_rank(plan.merged_infos().values())
    return f"{bound}rank {rank} in every module, {size(False)}{apart}"
