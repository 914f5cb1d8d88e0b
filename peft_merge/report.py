"""Words and tables about a merge: a look ahead (`--check`), merge_report.json, a summary."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit_ext.core import memory
from mergekit_ext.report.card import in_effect
from mergekit_ext.report.rho import Rho, rho_of
from peft_merge.adapter import Adapter, LoraAdapter, one_rank
from peft_merge.config.document import plain
from peft_merge.config.plan import MergePlan
from peft_merge.saved import saved_names

FORMAT_VERSION = 1

NEGLIGIBLE = 1e-6  # relative errors that are rounding
_LARGE = 0.05  # those that a user should do something about


def short(dtype: object) -> str:
    """Return the name of a dtype of torch without the package's."""
    return str(dtype).removeprefix("torch.")


def described(plan: MergePlan) -> dict[str, Any]:
    """Return method, adapters and options as reports show them."""
    inputs = plan.request.inputs
    adapters = []
    for adapter, item in zip(plan.adapters, inputs, strict=True):
        source = None if isinstance(item.source, Adapter) else str(item.source)
        adapters.append({"name": adapter.name, "source": source, "modules": len(adapter.infos)})
    given = plain({"shared": plan.request.parameters, "each": [i.parameters for i in inputs]})
    defaults = {p.name: p.default for p in plan.rule.parameters} if plan.rule else {}
    acting = {"merge_method": plan.request.method, **defaults, **given["shared"]}
    return {
        "method": plan.request.method,
        "in_effect": in_effect(acting, given["each"]),
        "paper": plan.rule and plan.rule.paper,
        "kind": plan.kind,
        "adapters": adapters,
        "parameters": given,
        **{name: getattr(plan, name) for name in ("rank", "patterns", "space", "seed")},
        "dtype": short(plan.dtype),
    }


def report(
    plan: MergePlan,
    modules: Mapping[str, Mapping[str, Any]],
    coefficients: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return all that is known of a merge, as JSON values; nothing of the run, so that it repeats.

    `modules` has the details of each piece, `coefficients` those of NAN, if it has a part.
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
        **described(plan),
        "summary": summary(len(modules), modules.items()),
        **rho_of(modules, str).stored,
        "modules": entries,
        "whole_tensors": {  # from which adapters; [] when dropped
            name: [names[position] for position in plan.saved.get(name, ())]
            for name in saved_names(plan.adapters)
        },
        "notes": list(plan.notes),
    }


def summary(count: int, merged: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return ranks and relative truncation errors over `count` modules, those of merged LoRAs."""
    found = [(entry["error"], entry["rank"], name) for name, entry in merged if "error" in entry]
    if not found:
        return {"modules": count}
    errors, ranks, _ = zip(*found, strict=True)
    largest, _, worst = max(found, key=lambda each: each[0])
    mean = math.fsum(errors) / len(errors)
    known = {"modules": count, "smallest_rank": min(ranks), "largest_rank": max(ranks)}
    return {**known, "largest_error": largest, "largest_error_in": worst, "mean_error": mean}


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a user should know of a finished merge or extraction."""
    summary = report["summary"]
    inputs = f"{len(report['adapters'])} adapters, " if "adapters" in report else ""
    line = f"{report['method']}: {inputs}{summary['modules']} modules"
    if "largest_rank" in summary:
        low, high = summary["smallest_rank"], summary["largest_rank"]
        line += f", rank {high}" if low == high else f", ranks {low} to {high}"
    yield f"{line} ({report['in_effect']})." if "in_effect" in report else f"{line}."
    if line := Rho(report.get("rho", {})).line:
        yield line
    if (error := summary.get("largest_error", 0)) > NEGLIGIBLE:
        remedy = " `rank: lossless` keeps everything, `rank: {energy: 0.99}` nearly everything."
        yield (
            f"Cutting off the rank changed the merged weights by {summary['mean_error']:.2%} on "
            f"average, at most {error:.2%} ({summary['largest_error_in']})."
            f"{remedy if inputs and error > _LARGE else ''}"
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
        dtypes = sorted({short(info.dtype) for info in adapter.infos.values()})
        counts = (str(len(adapter.infos)), str(len(adapter.saved)))
        rows.append((adapter.name, kind, rank, *counts, ", ".join(dtypes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _output(plan: MergePlan) -> str:
    size = f"{memory.size(plan.numbers * plan.dtype.itemsize)} of {short(plan.dtype)}"
    if plan.kind == "ia3":
        return f"{plan.numbers:,} numbers, {size}"
    bound = "" if isinstance(plan.rank, int) else "at most "
    if plan.patterns:
        return f"{bound}rank {max(map(plan.largest_rank, plan.modules))}, {size}"
    return f"{bound}rank {one_rank(plan.merged_infos().values())} in every module, {size}"
