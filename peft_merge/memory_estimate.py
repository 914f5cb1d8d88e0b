"""What a merge of adapters holds at its worst moment, from headers alone: see `memory`."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from mergekit_ext.core.memory import Need, square_of, working
from peft_merge.algebra.spaces import BLOCK, SMALL
from peft_merge.config.plan import MergePlan

_DOUBLE = 8
_MASKS = 3  # bytes an entry, of the question whether all are finite
_REMEDY = (
    "Merge fewer adapters at a time, set a smaller `rank`, or take a rule that works in the "
    "adapters' own small space (`linear`, `nan`, `lore`, `tsv_m`)."
)
_REMEDY_SAVED = (
    "Set `modules_to_save` to `drop`, or to the name of one adapter, whose tensors are taken as "
    "they are."
)


def need_of(plan: MergePlan) -> Need:
    """Return the need of the module or whole tensor that needs the most.

    The merged adapter is kept until it is written.
    """
    adapters = plan.adapters
    dtype = plan.dtype if plan.request.dtype is not None else None
    means = {
        name: _mean([adapters[i].saved[name]() for i in positions], dtype)
        for name, positions in plan.saved.items()
    }
    # Both sides of a factor are cut from one in float64 before the cast of the last module.
    copies = 2 * (len(adapters) if plan.rule is None else 1)
    output = copies * plan.numbers(patterns=plan.patterns) * plan.dtype.itemsize
    kept = {"the merged adapter": output + sum(out for out, _ in means.values())}
    whole = {name: work for name, (_, work) in means.items()}
    if plan.rule is None:  # each adapter keeps its own, and is written alone
        for adapter in adapters:
            own = [_mean([load()], dtype) for load in adapter.saved.values()]
            work = max((work for _, work in own), default=0)
            whole[f"adapter {adapter.name}"] = work + sum(out for out, _ in own)
    needs = [_of_module(plan, name, kept) for name in plan.modules]
    needs += [
        Need(name, {**kept, "whole tensors": work}, {}, _REMEDY_SAVED)
        for name, work in whole.items()
    ]
    return max(needs, key=lambda need: need.most, default=Need("nothing"))


def _of_module(plan: MergePlan, name: str, kept: dict[str, int]) -> Need:
    """Small modules are merged side by side, one a thread."""
    count, threads, rule = len(plan.adapters), torch.get_num_threads(), plan.rule
    if plan.kind == "ia3":
        vectors = _DOUBLE * math.prod(plan.shape(name)) * threads
        return Need(name, {**kept, **working(count + 4, vectors, count, 0, 1)}, {}, _REMEDY)
    matrices, rows, columns = plan.shape(name)
    ranks = sum(info.rank for info in plan.infos(name).values())
    factors = _DOUBLE * matrices * ranks * (rows + columns)
    entries = rows * columns
    if plan.space != "delta" or rule is None or rule.invariant(plan.resolve(name).options):
        merging = working(_copies(plan.space, count, rows, columns, ranks), factors, count, 0, 1)
    else:  # dense: the merged change and its decomposition, and rows or all changes at once
        dense = entries * (4 if entries > SMALL else _DOUBLE)
        block = _DOUBLE * max(BLOCK, columns)
        whole = 0 if rule.blockwise else rule.copies(count, square_of((rows, columns)))
        needed = working(whole + 3, dense, count, block, 1)
        merging = {"factors in float64": 4 * factors, **needed}
        threads = 1 if matrices * entries > SMALL else threads
    merging = {what: threads * size for what, size in merging.items()}
    if plan.device.type == "cpu":
        return Need(name, {**kept, **merging}, {}, _REMEDY)
    return Need(name, kept, {**kept, **merging}, _REMEDY)


def _copies(space: str, count: int, rows: int, columns: int, ranks: int) -> float:
    """How many copies of all factors of a module, in float64, a small space holds."""
    if space == "factors":
        return 3 * count + 8
    # Stacked factors, their bases and expansions; a core of each adapter, and what merges them.
    core = min(ranks, rows) * min(ranks, columns) / (ranks * (rows + columns))
    copies = 6 + (4 * count + 12) * core
    if space == "knots":  # cores, and a wide part of each adapter
        copies += (2 * count + 4) * columns / (rows + columns)
    return copies


def _mean(tensors: list[Tensor], dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of the mean of whole tensors, and of what makes it; inputs are mapped."""
    count = tensors[0].numel()
    stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    out = (dtype or stored).itemsize
    # Whether it is finite, in memory that the allocator may keep; the sum and one more in float64.
    each = max(stored.itemsize, out) + _MASKS + (2 * _DOUBLE if len(tensors) > 1 else 0)
    return count * out, count * each
