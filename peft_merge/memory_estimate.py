"""What a merge of adapters holds at its worst moment, from headers alone."""

import math
from functools import reduce

import torch
from torch import Tensor

from mergekit_ext.core.memory import Need, square_of, working
from peft_merge.algebra.spaces import SMALL, block_length
from peft_merge.config.plan import MergePlan

_DOUBLE = 8
_MASKS = 3  # bytes an entry, of the question whether all are finite
_REMEDY = (
    "Merge fewer adapters at a time, set a smaller `rank`, take a rule that works in the adapters' "
    "own small space (`linear`, `nan`, `lore`, `tsv_m`), or set `modules_to_save` to `drop`."
)


def need_of(plan: MergePlan) -> Need:
    """Return the need of the module that needs the most, beside whole tensors."""
    # The merged adapter is kept until it is written.
    adapters = plan.adapters
    if plan.rule is None:  # each adapter keeps its own, and is written alone
        outputs = [[[load()] for load in adapter.saved.values()] for adapter in adapters]
    else:
        saved = plan.saved.items()
        outputs = [[[adapters[i].saved[name]() for i in positions] for name, positions in saved]]
    means = [[_mean(tensors, plan.forced) for tensors in output] for output in outputs]
    # Both sides of a factor are cut from one in float64 before the cast of the last module.
    copies = 2 * (len(adapters) if plan.rule is None else 1)
    factors = copies * plan.numbers * plan.dtype.itemsize
    parts = {
        "the merged adapter": factors + max(sum(out for out, _ in output) for output in means),
        "whole tensors": max((work for output in means for _, work in output), default=0),
    }
    needs = [Need(name, parts | _merging(plan, name), _REMEDY) for name in plan.modules]
    return max(needs, key=lambda need: need.bytes, default=Need("the merge", parts, _REMEDY))


def _merging(plan: MergePlan, name: str) -> dict[str, int]:
    """Return what merging a module holds; small modules are merged side by side, one a thread."""
    count, rule = len(plan.adapters), plan.rule
    threads = torch.get_num_threads() if plan.device.type == "cpu" else 1
    if plan.kind == "ia3":
        return working(count + 4, _DOUBLE * math.prod(plan.shape(name)) * threads, count, 0, 1)
    matrices, rows, columns = plan.shape(name)
    ranks = sum(info.rank for info in plan.infos(name).values())
    factors = _DOUBLE * matrices * ranks * (rows + columns)
    if plan.space != "delta" or rule is None or rule.invariant(plan.resolve(name).options):
        copies = _copies(plan.space, count, rows, columns, ranks)
        return working(copies, factors * threads, count, 0, 1)
    # Dense: the merged change and its decomposition, and rows or all changes at once.
    entries = rows * columns
    dense = entries * (4 if entries > SMALL else _DOUBLE)
    whole = 0 if rule.blockwise else rule.copies(count, square_of((rows, columns)))
    piece = _DOUBLE * max(block_length(plan.device.type), columns)
    needed = working(whole + 3, dense, count, piece, 1)
    beside = 1 if matrices * entries > SMALL else threads
    needed["factors in float64"] = 4 * factors
    return {what: beside * size for what, size in needed.items()}


def _copies(space: str, count: int, rows: int, columns: int, ranks: int) -> float:
    """Return how many copies of all factors of a module, in float64, a small space holds."""
    if space == "factors":
        return 3 * count + 8
    # Stacked factors, their bases and expansions; a core of each adapter, and what merges them.
    core = min(ranks, rows) * min(ranks, columns) / (ranks * (rows + columns))
    copies = 6 + (4 * count + 12) * core
    if space == "knots":  # cores, and a wide part of each adapter
        copies += (2 * count + 4) * columns / (rows + columns)
    return copies


def _mean(tensors: list[Tensor], dtype: torch.dtype | None) -> tuple[int, int]:
    """Return the bytes of the mean of whole tensors, and of what makes it; inputs are mapped."""
    count = tensors[0].numel()
    stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    out = (dtype or stored).itemsize
    # Whether it is finite, in memory that the allocator may keep; the sum and one more in float64.
    each = max(stored.itemsize, out) + _MASKS + (2 * _DOUBLE if len(tensors) > 1 else 0)
    return count * out, count * each
