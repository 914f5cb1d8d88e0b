r"""`merge_method: flexmerge` for adapters.

FlexMerge (arXiv:2505.23209), section 3 and algorithm 1: every task keeps an adapter of its own, and
the tasks share a module's change where theirs are most alike, until all adapters together take no
more than `target_size`. Modules (or layers of them) are the blocks; a change is :math:`s B A` of a
LoRA, :math:`\ell - 1` or :math:`\log \ell` of an (IA)^3. An adapter without a module has a change
of zero there.

A group of two or more tasks shares F of its members' original changes, F being any method of
`mergekit_ext.declared` for adapters. The default is the paper's: task arithmetic with
:math:`\lambda` = 1.5 times the mean (footnote 1, section 4).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from mergekit_ext.core.parameters import Parameter, Values, choice
from mergekit_ext.declared import ADAPTERS
from mergekit_ext.errors import MergeError, Problem, listing, shown, warn
from mergekit_ext.events import BlockMerged, Dispatcher, SizeReached, TensorMeasured, measuring
from mergekit_ext.flexmerge.manifest import colliding_names
from mergekit_ext.flexmerge.plan import DEFAULT_ALGORITHM, Dendrograms, options
from mergekit_ext.flexmerge.storage import Size, Target
from mergekit_ext.flexmerge.stored import StoredGroup
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.kernels.threads import in_turn
from peft_merge.adapter import Adapter
from peft_merge.config.document import Request, written
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.family import GRANULARITIES, Block, Changes, Family, Ia3Family, LoraFamily
from peft_merge.flexmerge.manifest import FlexMerged, task_name_problem
from peft_merge.modules import rules, small
from peft_merge.report import FORMAT_VERSION, described, summary

NAME = "flexmerge"
EXPECTED = "a number of adapters such as 2.5, or a memory budget such as '40MB'"
OWN = options(
    Annotated[Target, BeforeValidator(partial(Target.parse, expected=EXPECTED))],
    # The default first.
    sorted(GRANULARITIES, key=lambda name: name != "module"),
    "2.25 (adapters)",
)
_NAMES = {parameter.name for parameter in OWN}

# Where the paper's defaults are not those of a merge of everything: lambda times the mean.
_DEFAULTS: Mapping[str, Values] = {"task_arithmetic": {"lambda": 1.5, "normalize": True}}
_RENAME = "Rename the adapter with `name:`."


def parameters(request: Request) -> tuple[Parameter, ...]:
    """Return FlexMerge's own, and those of the algorithm that is chosen."""
    # NAN's `granularity` is FlexMerge's here: its coefficients are those of each module and group.
    known = rules()
    chosen = request.parameters.get("algorithm", DEFAULT_ALGORITHM)
    own = tuple(replace(p, kind=choice(*known)) if p.name == "algorithm" else p for p in OWN)
    if not isinstance(chosen, str) or chosen not in known:
        # `algorithm` is refused; the others may be meant for the right one.
        given = {name for item in request.inputs for name in item.parameters}
        others = (given | request.parameters.keys()) - _NAMES
        return (*own, *(Parameter(name, Any, None, per_model=True) for name in others))
    defaults = _DEFAULTS.get(chosen, {})
    inherited = (
        replace(p, default=defaults.get(p.name, p.default))
        for p in known[chosen].for_driver(ADAPTERS)
        if p.name not in _NAMES
    )
    return (*own, *inherited)


def check_inputs(request: Request, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield what is wrong with the tasks and with what is asked for beside the parameters."""
    for name, value in request.parameters.items():
        if name in _NAMES and isinstance(value, (list, tuple, Mapping)):
            expected, remedy = "one value for the whole merge", "Give one value, without filters."
            yield Problem(f"parameters.{name}", shown(value), expected, remedy)
    names = [adapter.name for adapter in adapters]
    for name in names:
        if (reason := task_name_problem(name)) is not None:
            yield Problem("models", f"the name {name!r}", f"a task's name: {reason}", _RENAME)
    for name, other in colliding_names(dict.fromkeys(names)):
        expected = "names that differ in more than case, which name folders"
        yield Problem("models", f"{other!r} beside {name!r}", expected, _RENAME)
    with_bias = [adapter.name for adapter in adapters if adapter.config.get("lora_bias")]
    if 0 < len(with_bias) < len(adapters):
        found = f"{listing(with_bias)} with a bias of B, others without"
        yield Problem("lora_bias", found, "adapters that all have it, or none", "Leave some out.")
    if request.modules_to_save is not None:
        found = shown(request.modules_to_save)
        expected = "nothing: every task keeps its own whole tensors"
        yield Problem("modules_to_save", found, expected, "Take it out.")
    if request.rank is not None and not request.patterns:
        expected = "the one rank that all adapters of a FlexMerge have, the largest of the inputs"
        remedy = "Take it out, or set `patterns: true` for ranks that differ (for PEFT and vLLM)."
        yield Problem("rank", shown(request.rank), expected, remedy)
    if not any(adapter.infos for adapter in adapters):
        yield Problem("models", "adapters without adapted modules", "something to share")


def _chosen(plan: MergePlan) -> dict[str, Any]:
    """Return FlexMerge's own parameters of a checked plan."""
    given = plan.request.parameters
    return {p.name: p.read(given.get(p.name, p.default)) for p in OWN}


def _family(plan: MergePlan, chosen: Values) -> Family:
    made = LoraFamily if plan.kind == "lora" else Ia3Family
    return made(plan, rules()[chosen["algorithm"]], chosen["granularity"])


def check(plan: MergePlan) -> Iterator[Problem]:
    """Yield what is wrong with the algorithm and the size, from configurations and headers."""
    chosen = _chosen(plan)
    rule = rules()[chosen["algorithm"]]
    problems = plan.resolve.checked(rule)
    yield from problems
    # The size, as far as headers show it.
    if not problems and isinstance(plan.rank, (int, NoneType)):
        problem = _family(plan, chosen).problem(chosen["target_size"])
        yield from () if problem is None else (problem,)


def run(plan: MergePlan, events: Dispatcher) -> FlexMerged:
    """Merge a checked plan.

    The inputs are read twice, one module at a time: once for the similarities of all tasks, once
    for what is stored.

    Raises:
        ConfigError: the target size cannot be reached.
        NonFiniteError: an adapter holds NaN or infinity.
        MergeError: changes, or a merged one, leave the range of their dtype.
    """
    chosen = _chosen(plan)
    family = _family(plan, chosen)
    similarities = _similarities(family, events)
    planner = Dendrograms(family, similarities, chosen["linkage"], chosen["order"], plan.seed)
    best = planner.plan(chosen["target_size"])
    counts = {len(group.tasks) for block in best.groups for group in block} - {1}
    for warning in plan.resolve.forewarnings(family.rule, sorted(counts)):
        warn(warning)
    names = [adapter.name for adapter in plan.adapters]
    changes: list[Changes] = [{} for _ in names]
    blocks: list[dict[str, Any]] = []

    def of_block(work: tuple[Block, Sequence[StoredGroup]]) -> list[Changes]:
        block, groups = work
        return [family.changes(block.modules, group.tasks) for group in groups]

    work = list(zip(family.layout, best.groups, strict=True))
    beside = small(plan.adapters, family.rule, plan.resolve, plan.space)
    results = in_turn(of_block, work, plan.device) if beside else map(of_block, work)
    for (block, groups), found, similar in zip(work, results, similarities, strict=True):
        parts: list[dict[str, Any]] = []
        for group, stored in zip(groups, found, strict=True):
            for task in group.tasks:
                changes[task].update(stored)
            parts.append(
                {
                    "tasks": [names[task] for task in group.tasks],
                    "similarity": group.similarity,
                    "modules": {module: dict(piece.details) for module, piece in stored.items()},
                }
            )
        blocks.append({"name": block.name, "groups": parts, "similarities": similar.tolist()})
        events.emit(BlockMerged(block.name, tuple(tuple(each["tasks"]) for each in parts)))
    adapters = tuple(family.adapter(task, own) for task, own in enumerate(changes))
    events.emit(SizeReached(family.rule.name, best.size.models, best.size.bytes))
    # Upwards: each is a `target_size` that its adapters fit in.
    sizes = [math.ceil(each.models * 1e6 - 1e-3) / 1e6 for each in planner.trajectory]
    report = _report(plan, chosen, best.size, sizes, blocks)
    return FlexMerged(adapters, report, written(plan.request, plan.adapters))


def _report(
    plan: MergePlan, chosen: Values, size: Size, sizes: Sequence[float], blocks: Sequence[Values]
) -> dict[str, Any]:
    """Return all that is known of a merge, and nothing of the run."""
    target = chosen["target_size"]
    count = len(plan.adapters)
    apart = size.unit_bytes * count + size.private_bytes
    note = (
        f"{count} adapters in the space of {size.models:.4g}: {size.bytes:,} bytes when their "
        f"tensors are shared (peft_merge.load_tasks), instead of {apart:,.0f}. Each folder is a "
        "whole adapter."
    )
    modules = [item for b in blocks for group in b["groups"] for item in group["modules"].items()]
    return {
        "format_version": FORMAT_VERSION,
        **described(plan),
        "flexmerge": {
            "algorithm": chosen["algorithm"],
            "target_size": str(target) if target.models is None else f"{target} adapters",
            **{name: chosen[name] for name in ("linkage", "order", "granularity")},
        },
        "size": {
            "adapters": size.models,
            "bytes": size.bytes,
            "unit_bytes": size.unit_bytes,
            "private_bytes": size.private_bytes,
        },
        "sizes": sizes,
        # Ranks and truncation errors are those of what is shared.
        "summary": summary(len({module for module, _ in modules}), modules),
        "blocks": blocks,
        "notes": [*plan.notes, note],
    }


def _similarities(family: Family, events: Dispatcher) -> list[Tensor]:
    def gram_of(block: Block) -> Tensor:
        return torch.stack([family.gram(module) for module in block.modules]).sum(dim=0)

    blocks, found = family.layout, []
    with measuring(events.emit, len(blocks), "block"):
        for block, gram in zip(blocks, in_turn(gram_of, blocks, family.plan.device), strict=True):
            if not bool(torch.isfinite(gram).all()):
                raise MergeError(
                    f"{block.name}: the changes are so large that their squares leave the range of "
                    "float64. Check the scalings of these adapters."
                )
            found.append(cosines(gram))
            events.emit(TensorMeasured(block.name))
    return found
