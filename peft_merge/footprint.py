"""What a merge of adapters holds at its worst moment, from headers alone: upper estimates.

docs/limits.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from mergekit_ext.memory import Need
from peft_merge.adapter import LoraAdapter
from peft_merge.algebra.dense import BLOCK, SMALL
from peft_merge.config.plan import MergePlan, WholeMethod
from peft_merge.rules.base import Rule

Parts = Mapping[str, int]
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


@dataclass(frozen=True)
class _Saved:
    """A whole tensor of the output: bytes of the result, and of what makes it."""

    name: str
    out: int
    work: int


@dataclass(frozen=True)
class _Module:
    """One module of all adapters: n matrices, m adapters, the sum of their ranks."""

    name: str
    matrices: int
    rows: int
    columns: int
    adapters: int
    ranks: int
    rule: Rule | None

    @property
    def factors(self) -> int:
        """Bytes of all factors in float64."""
        return _DOUBLE * self.matrices * self.ranks * (self.rows + self.columns)

    @property
    def core(self) -> int:
        """Bytes of one core in float64."""
        width = min(self.ranks, self.rows) * min(self.ranks, self.columns)
        return _DOUBLE * self.matrices * width


def need_of(plan: MergePlan) -> Need:
    """Of the module or whole tensor that needs the most, with the merged adapter, kept whole."""
    saved = list(_saved(plan))
    output = {"the merged adapter": _output(plan) + sum(one.out for one in saved)}
    threads = torch.get_num_threads()
    if plan.kind == "ia3":
        vectors = max((math.prod(plan.shape(name)) for name in plan.modules), default=0)
        work = 8 * (len(plan.adapters) + 4) * vectors * threads
        needs = [Need("the adapter", {**output, "vectors": work}, {}, _REMEDY)]
    else:
        needs = [_placed(plan, _module(plan, name), output, threads) for name in plan.modules]
    needs += [
        Need(one.name, {**output, "whole tensors": one.work}, {}, _REMEDY_SAVED) for one in saved
    ]
    return max(needs, key=lambda need: max(need.bytes, need.device_bytes), default=Need("nothing"))


def _placed(plan: MergePlan, module: _Module, output: Parts, threads: int) -> Need:
    parts = SPACES[plan.space](module)
    side_by_side = 1 if "dense changes" in parts and _large(module) else threads
    working = {what: side_by_side * count for what, count in parts.items()}
    if plan.device.type == "cpu":
        return Need(module.name, {**output, **working}, {}, _REMEDY)
    return Need(module.name, output, {**output, **working}, _REMEDY)


def _module(plan: MergePlan, name: str) -> _Module:
    loras = [a for a in plan.adapters if isinstance(a, LoraAdapter) and name in a.infos]
    matrices, rows, columns = plan.shape(name)
    ranks = sum(adapter.infos[name].rank for adapter in loras)
    rule = None
    if not isinstance(plan.method, WholeMethod):
        invariant = plan.method.invariant_with(plan.resolve(name).options)
        rule = None if invariant else plan.method
    return _Module(name, matrices, rows, columns, len(plan.adapters), ranks, rule)


def _large(module: _Module) -> bool:
    return module.matrices * module.rows * module.columns > SMALL


def _output(plan: MergePlan) -> int:
    """The merged adapter, or all that a whole-merge method may make, and its bytes when saved."""
    if plan.kind == "ia3":
        count = sum(math.prod(plan.shape(name)) for name in plan.modules)
    else:
        ranks = {name: _rank(plan, name) for name in plan.modules}
        if not plan.patterns:
            ranks = dict.fromkeys(ranks, max(ranks.values(), default=0))
        count = sum(_numbers(plan.shape(name), rank) for name, rank in ranks.items())
    copies = len(plan.adapters) if isinstance(plan.method, WholeMethod) else 1
    # Both sides of a factor are cut from one in float64 before the cast of the last module.
    return 2 * copies * count * plan.dtype.itemsize


def _saved(plan: MergePlan) -> Iterator[_Saved]:
    """What whole tensors take; their inputs are mapped, or held before."""
    dtype = plan.dtype if plan.request.dtype is not None else None
    for name, positions in plan.saved.items():
        yield _mean(name, [plan.adapters[i].saved[name]() for i in positions], dtype)
    if isinstance(plan.method, WholeMethod):  # each adapter keeps its own, and is written alone
        for adapter in plan.adapters:
            own = [_mean(name, [load()], dtype) for name, load in adapter.saved.items()]
            work = max((one.work for one in own), default=0)
            yield _Saved(f"adapter {adapter.name}", 0, work + sum(one.out for one in own))


def _mean(name: str, tensors: Sequence[Tensor], dtype: torch.dtype | None) -> _Saved:
    count = tensors[0].numel()
    stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    out = (dtype or stored).itemsize
    wide = max(stored.itemsize, out)
    # Whether it is finite, in memory that the allocator may keep; the sum and one more in float64.
    each = wide + _MASKS + (2 * _DOUBLE if len(tensors) > 1 else 0)
    return _Saved(name, count * out, count * each)


def _rank(plan: MergePlan, name: str) -> int:
    """An upper bound of what the module needs."""
    _, rows, columns = plan.shape(name)
    ranks = sum(
        a.infos[name].rank for a in plan.adapters if isinstance(a, LoraAdapter) and name in a.infos
    )
    rank = plan.rank if isinstance(plan.rank, int) else ranks
    if plan.rank is not None and not isinstance(plan.rank, int):
        rank = min(rows, columns)  # of an elementwise rule nothing less is sure
    return min(rank, rows, columns)


def _numbers(shape: Sequence[int], rank: int) -> int:
    matrices, rows, columns = shape
    return matrices * rank * (rows + columns)


def _in_core(module: _Module) -> Parts:
    """Stacked factors, their bases and expansions; a core of each adapter, and what merges them."""
    return {
        "factors in float64": 6 * module.factors,
        "cores in float64": (4 * module.adapters + 12) * module.core,
    }


def _in_delta(module: _Module) -> Parts:
    """The merged change, its decomposition, and either blocks of rows or all changes at once."""
    if module.rule is None:
        return _in_core(module)
    entries = module.rows * module.columns
    width = 4 if entries > SMALL else _DOUBLE
    at_once = 0 if module.rule.blockwise is not None else 3 * module.adapters + 4
    block = min(entries, max(BLOCK, module.columns))
    return {
        "factors in float64": 4 * module.factors,
        "dense changes": (3 + at_once) * entries * width,
        "blocks of rows": (2 * module.adapters + 10) * block * _DOUBLE,
    }


def _in_knots(module: _Module) -> Parts:
    """Cores, and a wide part of each adapter."""
    parts = _DOUBLE * module.matrices * module.ranks * module.columns
    own = {"parts in float64": (2 * module.adapters + 4) * parts}
    return {**_in_core(module), **own}


def _in_factors(module: _Module) -> Parts:
    """The factors themselves."""
    return {"factors in float64": (3 * module.adapters + 8) * module.factors}


SPACES: Mapping[str, Callable[[_Module], Parts]] = {
    "delta": _in_delta,
    "core": _in_core,
    "knots": _in_knots,
    "factors": _in_factors,
}
