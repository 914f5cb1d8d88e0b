"""Words and tables about a merge: a look ahead (`--check`), merge_report.json, a summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_ext.core.memory import in_units
from peft_merge import saved
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo, one_rank
from peft_merge.config.plan import MergePlan

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
            entry["ranks"] = {name: info.rank for name, info in _infos(plan, module).items()}
        entries[module] = {**entry, **details}
    return {
        "format_version": FORMAT_VERSION,
        **plan.described(),
        "summary": summary(len(modules), modules.items()),
        "modules": entries,
        "whole_tensors": saved.summary(plan.saved, plan.adapters),
        "notes": list(plan.notes),
    }


def _infos(plan: MergePlan, module: str) -> dict[str, ModuleInfo]:
    loras = [adapter for adapter in plan.adapters if isinstance(adapter, LoraAdapter)]
    return {adapter.name: adapter.infos[module] for adapter in loras if module in adapter.infos}


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
    shared = sum(all(module in a.infos for a in plan.adapters) for module in plan.modules)
    lines = [
        "No problems.",
        "",
        *_table(plan.adapters),
        "",
        f"Method:  {plan.request.method} (space: {plan.space})",
        f"Modules: {len(plan.modules)}, {shared} of them in all adapters",
    ]
    if plan.rule is not None:
        if names := saved.saved_names(plan.adapters):
            lines.append(f"Whole:   {len(plan.saved)} of {len(names)} tensors kept")
        lines.append(f"Output:  {_output(plan)}")
    lines += [f"Note: {note}" for note in (*plan.notes, *map(str, plan.forewarnings))]
    return "\n".join(lines)


def _table(adapters: Sequence[Adapter]) -> Iterator[str]:
    rows = [("adapter", "kind", "rank", "modules", "whole tensors", "dtype")]
    for adapter in adapters:
        kind, ranks = "(IA)^3", set[int]()
        if isinstance(adapter, LoraAdapter):
            kind, ranks = "LoRA", {info.rank for info in adapter.infos.values()}
        low, high = min(ranks, default="-"), max(ranks, default="-")
        rank = f"{low}" if low == high else f"{low} to {high}"
        dtypes = ", ".join(sorted({_short(info.dtype) for info in adapter.infos.values()}))
        counts = (str(len(adapter.infos)), str(len(adapter.saved)))
        rows.append((adapter.name, kind, rank, *counts, dtypes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _output(plan: MergePlan) -> str:
    if plan.kind == "ia3":
        numbers = sum(math.prod(plan.shape(module)) for module in plan.modules)
        return f"{numbers:,} numbers, {_size(plan, numbers)}"
    bound = "" if isinstance(plan.rank, int) else "at most "
    infos = {
        module: replace(next(iter(_infos(plan, module).values())), rank=_largest_rank(plan, module))
        for module in plan.modules
    }
    own = _size(plan, sum(info.rank * _sides(info) for info in infos.values()))
    if plan.patterns:
        return f"{bound}rank {max(info.rank for info in infos.values())}, {own}"
    r = one_rank(infos.values())
    padded = _size(plan, sum(r // info.groups * _sides(info) for info in infos.values()))
    apart = "" if padded == own else f" ({bound}{own} with `patterns: true`)"
    return f"{bound}rank {r} in every module, {padded}{apart}"


def _sides(info: ModuleInfo) -> int:
    """Numbers of the factors at rank 1."""
    return info.matrices * (info.rows + info.columns)


def _largest_rank(plan: MergePlan, module: str) -> int:
    """The rank that the module can get: known before the merge for a number, else a bound."""
    _, rows, columns = plan.shape(module)
    bound = min(rows, columns)
    if isinstance(plan.rank, int):
        return min(plan.rank, bound)
    in_span = False  # of the factors
    if plan.rule is not None:
        options = plan.resolve(module).options
        in_span = plan.space != "delta" or plan.rule.invariant(options)
    if plan.rank is not None and not in_span:
        return bound
    return min(sum(info.rank for info in _infos(plan, module).values()), bound)


def _size(plan: MergePlan, numbers: int) -> str:
    return f"{in_units(numbers * plan.dtype.itemsize)} of {_short(plan.dtype)}"
