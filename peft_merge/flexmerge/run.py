"""From adapters to m adapters that share: compare, choose, merge the groups."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError
from mergekit_ext.events import (
    BlockMerged,
    Dispatcher,
    SizeReached,
    StatisticsBegin,
    StatisticsEnd,
    TensorMeasured,
)
from mergekit_ext.flexmerge.plan import Dendrograms
from mergekit_ext.flexmerge.storage import Size, StoredGroup, Target
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.kernels.threads import in_turn
from mergekit_ext.methods import ADAPTERS, Inputs, Method
from peft_merge.config.document import written
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.family import AdapterStorage, Block, Family, blocks_of
from peft_merge.flexmerge.ia3 import Ia3Family
from peft_merge.flexmerge.lora import LoraFamily
from peft_merge.flexmerge.result import FlexMerged
from peft_merge.modules import Piece
from peft_merge.report import FORMAT_VERSION, summary

# Of modules, by their names.
Changes = dict[str, Piece[Any, Any]]

FAMILIES: Mapping[str, Callable[[MergePlan, Method], Family]] = {
    "lora": LoraFamily,
    "ia3": Ia3Family,
}


@dataclass(frozen=True)
class Options:
    """FlexMerge's own parameters, checked: how groups are found, and merged."""

    target: Target
    rule: Method
    linkage: str
    order: str
    granularity: str

    def described(self) -> dict[str, Any]:
        """Return them as the manifest and the report show them."""
        unit = "" if self.target.models is None else " adapters"
        return {
            "algorithm": self.rule.name,
            "target_size": f"{self.target}{unit}",
            "linkage": self.linkage,
            "order": self.order,
            "granularity": self.granularity,
        }


def storage_of(plan: MergePlan, options: Options) -> AdapterStorage:
    """Return how the groups of a checked plan are stored, from headers."""
    blocks = blocks_of(plan.modules, options.granularity)
    return AdapterStorage(FAMILIES[plan.kind](plan, options.rule), blocks)


def merge(plan: MergePlan, options: Options, events: Dispatcher) -> FlexMerged:
    """Run a checked plan.

    The inputs are read twice, one module at a time: once for the similarities of all tasks, once
    for what is stored.

    Raises:
        ConfigError: the target size cannot be reached.
        NonFiniteError: an adapter holds NaN or infinity.
        MergeError: changes, or a merged one, leave the range of their dtype.
    """
    family = FAMILIES[plan.kind](plan, options.rule)
    blocks = blocks_of(plan.modules, options.granularity)
    similarities = _similarities(family, blocks, plan.device, events)
    planner = Dendrograms(
        AdapterStorage(family, blocks), similarities, options.linkage, options.order, plan.seed
    )
    chosen = planner.plan(options.target)
    _forewarn(plan, options.rule, chosen.groups)
    names = [adapter.name for adapter in plan.adapters]
    pieces: list[Changes] = [{} for _ in names]
    shared: list[set[str]] = [set() for _ in names]
    entries = []
    work = list(zip(blocks, chosen.groups, strict=True))
    merge_block = partial(_merge_block, family)
    results = in_turn(merge_block, work, plan.device) if family.small else map(merge_block, work)
    for (block, groups), found, similar in zip(work, results, similarities, strict=True):
        for group, changes in zip(groups, found, strict=True):
            for task in group.tasks:
                pieces[task].update(changes)
                if len(group.tasks) > 1:
                    shared[task].update(changes)
        described = [
            {
                "tasks": [names[task] for task in group.tasks],
                "similarity": group.similarity,
                "modules": {module: dict(piece.details) for module, piece in changes.items()},
            }
            for group, changes in zip(groups, found, strict=True)
        ]
        entries.append({"name": block.name, "groups": described, "similarities": similar.tolist()})
        named = tuple(tuple(names[task] for task in group.tasks) for group in groups)
        events.emit(BlockMerged(block.name, named))
    adapters = tuple(family.adapter(task, own, shared[task]) for task, own in enumerate(pieces))
    size = chosen.size
    events.emit(SizeReached(options.rule.name, size.models, size.bytes))
    report = _report(plan, options, size, planner.trajectory, entries)
    return FlexMerged(adapters, report, written(plan.request, plan.adapters))


def _similarities(
    family: Family, blocks: Sequence[Block], device: torch.device, events: Dispatcher
) -> list[Tensor]:
    def gram_of(block: Block) -> Tensor:
        return torch.stack([family.gram(module) for module in block.modules]).sum(dim=0)

    started = time.perf_counter()
    events.emit(StatisticsBegin(len(blocks), "block"))
    found = []
    for block, gram in zip(blocks, in_turn(gram_of, blocks, device), strict=True):
        if not bool(torch.isfinite(gram).all()):
            raise MergeError(
                f"{block.name}: the changes are so large that their squares leave the range of "
                "float64. Check the scalings of these adapters."
            )
        found.append(cosines(gram))
        events.emit(TensorMeasured(block.name))
    events.emit(StatisticsEnd({}, time.perf_counter() - started))
    return found


def _forewarn(plan: MergePlan, rule: Method, groups: Sequence[Sequence[StoredGroup]]) -> None:
    """Warn once of what the rule has to say of groups of such sizes."""
    counts = {len(group.tasks) for found in groups for group in found} - {1}
    said = {
        str(warning): warning
        for module in plan.modules
        for count in sorted(counts)
        for warning in rule.forewarn(plan.resolve(module).options, Inputs(count, driver=ADAPTERS))
    }
    for warning in said.values():
        warnings.warn(warning, stacklevel=6)


def _merge_block(family: Family, work: tuple[Block, Sequence[StoredGroup]]) -> list[Changes]:
    """Return what each group of a block has there."""
    block, groups = work
    return [
        family.own(block.modules, group.tasks[0])
        if len(group.tasks) == 1
        else family.merge(block.modules, group.tasks)
        for group in groups
    ]


def _report(
    plan: MergePlan,
    options: Options,
    size: Size,
    sizes: Sequence[Size],
    blocks: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return merge_report.json: all that is known of a merge, and nothing of the run."""
    modules = [item for b in blocks for group in b["groups"] for item in group["modules"].items()]
    count = len(plan.adapters)
    apart = size.unit_bytes * count + size.private_bytes
    note = (
        f"{count} adapters in the space of {size.models:.4g}: {size.bytes:,} bytes when their "
        f"tensors are shared (peft_merge.load_tasks), instead of {apart:,.0f}. Each folder is a "
        "whole adapter."
    )
    return {
        "format_version": FORMAT_VERSION,
        **plan.described(),
        "flexmerge": options.described(),
        "size": {
            "adapters": size.models,
            "bytes": size.bytes,
            "unit_bytes": size.unit_bytes,
            "private_bytes": size.private_bytes,
        },
        # Upwards: each is a `target_size` that its adapters fit in.
        "sizes": [math.ceil(each.models * 1e6 - 1e-3) / 1e6 for each in sizes],
        # Ranks and truncation errors are those of what is shared.
        "summary": summary(
            len({module for module, _ in modules}),
            [(module, details) for module, details in modules if "error" in details],
        ),
        "blocks": list(blocks),
        "notes": [*plan.notes, note],
    }
