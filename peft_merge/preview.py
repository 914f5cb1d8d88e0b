"""What `peft-merge --check` prints: the adapters, and what would be written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo
from peft_merge.config.plan import MergePlan
from peft_merge.config.saved import saved_names
from peft_merge.io.layouts import at_rank, one_rank
from peft_merge.methods import WholeMethod


def preview(plan: MergePlan) -> str:
    """Some lines of text about a merge that can start."""
    shared = sum(all(module in a.infos for a in plan.adapters) for module in plan.modules)
    lines = [
        "No problems.",
        "",
        *_table(plan.adapters),
        "",
        f"Method:  {plan.method.name} (space: {plan.space})",
        f"Modules: {len(plan.modules)}, {shared} of them in all adapters",
    ]
    if saved_names(plan.adapters) and not isinstance(plan.method, WholeMethod):
        lines.append(
            f"Whole:   {len(plan.saved)} of {len(saved_names(plan.adapters))} tensors kept"
        )
    if not isinstance(plan.method, WholeMethod):
        lines.append(f"Output:  {_output(plan)}")
    lines += [f"Note: {note}" for note in (*plan.notes, *map(str, plan.forewarnings))]
    return "\n".join(lines)


def _table(adapters: Sequence[Adapter]) -> Iterator[str]:
    rows = [("adapter", "kind", "rank", "modules", "whole tensors", "dtype")]
    rows += [
        (
            adapter.name,
            "LoRA" if isinstance(adapter, LoraAdapter) else "(IA)^3",
            _ranks(adapter),
            str(len(adapter.infos)),
            str(len(adapter.saved)),
            ", ".join(sorted({_short(info.dtype) for info in adapter.infos.values()})),
        )
        for adapter in adapters
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _ranks(adapter: Adapter) -> str:
    if not isinstance(adapter, LoraAdapter) or not adapter.infos:
        return "-"
    ranks = [info.rank for info in adapter.infos.values()]
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _output(plan: MergePlan) -> str:
    if plan.kind == "ia3":
        numbers = sum(math.prod(plan.shape(module)) for module in plan.modules)
        return (
            f"{numbers:,} numbers, {_size(numbers * plan.dtype.itemsize)} of {_short(plan.dtype)}"
        )
    bound = "" if isinstance(plan.rank, int) else "at most "
    ranks = {module: _largest_rank(plan, module) for module in plan.modules}
    own = _factors(plan, ranks)
    if plan.patterns:
        return f"{bound}rank {max(ranks.values())}, {own}"
    infos = (replace(_info(plan, name), rank=rank) for name, rank in ranks.items())
    r = one_rank(infos)
    one = {module: at_rank(_info(plan, module), r) for module in plan.modules}
    padded = _factors(plan, one)
    apart = "" if padded == own else f" ({bound}{own} with `patterns: true`)"
    return f"{bound}rank {r} in every module, {padded}{apart}"


def _info(plan: MergePlan, module: str) -> ModuleInfo:
    return next(
        a.infos[module] for a in plan.adapters if isinstance(a, LoraAdapter) and module in a.infos
    )


def _factors(plan: MergePlan, ranks: Mapping[str, int]) -> str:
    """The size of factors of these ranks."""
    numbers = 0
    for module, rank in ranks.items():
        matrices, rows, columns = plan.shape(module)
        numbers += matrices * rank * (rows + columns)
    return f"{_size(numbers * plan.dtype.itemsize)} of {_short(plan.dtype)}"


def _largest_rank(plan: MergePlan, module: str) -> int:
    """That the module can get: known before the merge for a number, else a bound."""
    _, rows, columns = plan.shape(module)
    stacked = sum(
        a.infos[module].rank
        for a in plan.adapters
        if isinstance(a, LoraAdapter) and module in a.infos
    )
    bound = min(rows, columns)
    if isinstance(plan.rank, int):
        return min(plan.rank, bound)
    return min(stacked, bound) if plan.rank is None or _low_rank(plan, module) else bound


def _low_rank(plan: MergePlan, module: str) -> bool:
    """Whether the result lies in the span of the factors."""
    if isinstance(plan.method, WholeMethod):
        return False
    return plan.space != "delta" or plan.method.invariant_with(plan.resolve(module).options)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
