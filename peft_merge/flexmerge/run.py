"""From adapters to m adapters that share: compare, choose, merge the groups."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError, Problem
from mergekit_ext.events import (
    BlockMerged,
    Dispatcher,
    SizeReached,
    StatisticsBegin,
    StatisticsEnd,
    TensorMeasured,
)
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.kernels.threads import in_turn
from mergekit_ext.methods import ADAPTERS, Inputs, Method
from peft_merge.config.document import written
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.blocks import Block, blocks_of
from peft_merge.flexmerge.family import Family, Piece
from peft_merge.flexmerge.ia3 import Ia3Family
from peft_merge.flexmerge.lora import LoraFamily
from peft_merge.flexmerge.options import Options
from peft_merge.flexmerge.private import private_bytes
from peft_merge.flexmerge.report import MergedBlock, MergedGroup, report
from peft_merge.flexmerge.result import FlexMerged
from peft_merge.flexmerge.target import Size, out_of_reach
from peft_merge.flexmerge.trajectory import Shared, Trajectory

# Of modules, by their names.
Changes = dict[str, Piece[Any, Any]]

FAMILIES: Mapping[str, Callable[[MergePlan, Method], Family]] = {
    "lora": LoraFamily,
    "ia3": Ia3Family,
}


def merge(plan: MergePlan, options: Options, events: Dispatcher) -> FlexMerged:
    """Merge as a checked plan says.

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
    forced = plan.dtype if plan.request.dtype is not None else None
    trajectory = Trajectory(
        family,
        blocks,
        similarities,
        private_bytes(plan.adapters, forced),
        linkage=options.linkage,
        order=options.order,
        seed=plan.seed,
    )
    step = trajectory.first(options.target)
    size = trajectory.sizes[step]
    groups = trajectory.at(step)
    _forewarn(plan, options.rule, groups)
    pieces: list[Changes] = [{} for _ in plan.adapters]
    shared: list[set[str]] = [set() for _ in plan.adapters]
    merged = []
    merge_block = partial(_merge_block, family)
    work = list(zip(blocks, groups, strict=True))
    results = in_turn(merge_block, work, plan.device) if family.small else map(merge_block, work)
    for (block, found), changes in zip(work, results, strict=True):
        merged.append(_shared_out(block, found, changes, pieces, shared))
        named = tuple(tuple(plan.adapters[i].name for i in group.tasks) for group in found)
        events.emit(BlockMerged(block.name, named))
    adapters = tuple(family.adapter(task, own, shared[task]) for task, own in enumerate(pieces))
    events.emit(SizeReached(options.rule.name, size.adapters, size.bytes))
    return FlexMerged(
        adapters,
        report(plan, options, merged, similarities, trajectory.sizes, step),
        written(plan.request, plan.adapters),
    )


def unreachable(plan: MergePlan, options: Options) -> Problem | None:
    """Whether the target size is beyond what is possible, without reading a factor.

    However tasks share a block, it takes the room of the largest of their own changes (cut to the
    rank of what is shared). Between that bound and what the similarities lead to, `merge` tells.
    """
    family = FAMILIES[plan.kind](plan, options.rule)
    tasks = range(len(plan.adapters))
    most = least = 0
    for block in blocks_of(plan.modules, options.granularity):
        own = [family.bytes(block.modules, (task,)) for task in tasks]
        cut = [family.bytes(block.modules, (task, task)) for task in tasks]
        most += sum(own)
        least += max(map(min, own, cut))
    forced = plan.dtype if plan.request.dtype is not None else None
    private = private_bytes(plan.adapters, forced)
    sizes = [Size(total + private, most / len(tasks), private) for total in (most, least)]
    return None if options.target.within(sizes) else out_of_reach(options.target, sizes)


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


def _forewarn(plan: MergePlan, rule: Method, groups: Sequence[Sequence[Shared]]) -> None:
    """What the rule says of groups of such sizes, once."""
    counts = {len(group.tasks) for found in groups for group in found} - {1}
    said = {
        str(warning): warning
        for module in plan.modules
        for count in sorted(counts)
        for warning in rule.forewarn(plan.resolve(module).options, Inputs(count, driver=ADAPTERS))
    }
    for warning in said.values():
        warnings.warn(warning, stacklevel=6)


def _merge_block(family: Family, work: tuple[Block, Sequence[Shared]]) -> list[Changes]:
    """What each group of a block has there."""
    block, groups = work
    return [
        family.own(block.modules, group.tasks[0])
        if len(group.tasks) == 1
        else family.merge(block.modules, group.tasks)
        for group in groups
    ]


def _shared_out(
    block: Block,
    groups: Sequence[Shared],
    changes: Sequence[Changes],
    pieces: Sequence[Changes],
    shared: Sequence[set[str]],
) -> MergedBlock:
    """Give the changes of a block's groups to their tasks."""
    merged = []
    for group, found in zip(groups, changes, strict=True):
        for task in group.tasks:
            pieces[task].update(found)
            if len(group.tasks) > 1:
                shared[task].update(found)
        details = {module: dict(piece.details) for module, piece in found.items()}
        merged.append(MergedGroup(group.tasks, group.similarity, details))
    return MergedBlock(block.name, tuple(merged))
