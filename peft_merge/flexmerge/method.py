r"""`merge_method: flexmerge` for adapters.

FlexMerge (arXiv:2505.23209), section 3 and algorithm 1: every task keeps an adapter of its own, and
the tasks share a module's change where theirs are most alike, until all adapters together take no
more than `target_size`. Modules (or layers of them) are the blocks; a change is :math:`s B A` of a
LoRA, :math:`\ell - 1` or :math:`\log \ell` of an (IA)^3. An adapter without a module has a change
of zero there.

A group of two or more tasks shares F of its members' original changes, F being any method of
`mergekit_ext.methods` for adapters. The default is the paper's: task arithmetic with
:math:`\lambda` = 1.5 times the mean (footnote 1, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import Annotated, Any

from pydantic import BeforeValidator

from mergekit_ext.core.parameters import Parameter, choice
from mergekit_ext.errors import Problem, listing, shown
from mergekit_ext.events import Dispatcher
from mergekit_ext.flexmerge.plan import DEFAULT_ALGORITHM, options
from mergekit_ext.flexmerge.storage import Target
from mergekit_ext.methods import ADAPTERS, Inputs, Method
from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.config.document import Request
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.family import GRANULARITIES
from peft_merge.flexmerge.manifest import task_name_problem
from peft_merge.flexmerge.result import FlexMerged
from peft_merge.flexmerge.run import Options, merge, storage_of
from peft_merge.methods import of_any_rule, rules

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
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "task_arithmetic": {"lambda": 1.5, "normalize": True},
}


def parameters(shared: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Return FlexMerge's own, and those of the algorithm that is chosen.

    NAN's `granularity` is FlexMerge's here: its coefficients are those of each module and group.
    """
    known = rules()
    chosen = shared.get("algorithm", DEFAULT_ALGORITHM)
    rule = known.get(chosen) if isinstance(chosen, str) else None
    own = tuple(replace(p, kind=choice(*known)) if p.name == "algorithm" else p for p in OWN)
    if rule is None:  # said of `algorithm`; what any algorithm has may be meant for the right one
        return (*own, *(p for p in of_any_rule() if p.name not in _NAMES))
    defaults = _DEFAULTS.get(rule.name, {})
    inherited = (
        replace(p, default=defaults.get(p.name, p.default))
        for p in rule.for_driver(ADAPTERS)
        if p.name not in _NAMES
    )
    return (*own, *inherited)


def check_inputs(request: Request, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield what is wrong with the tasks and with what is asked for beside the parameters."""
    for name in sorted(_varying(request)):
        found = shown(request.parameters[name])
        remedy = "Give one value, without filters."
        yield Problem(f"parameters.{name}", found, "one value for the whole merge", remedy)
    yield from _tasks(request, adapters)
    yield from _lora_biases(adapters)
    if request.modules_to_save is not None:
        found = shown(request.modules_to_save)
        expected = "nothing: every task keeps its own whole tensors"
        yield Problem("modules_to_save", found, expected, "Take it out.")
    if request.rank is not None and not request.patterns:
        expected = "the one rank that all adapters of a FlexMerge have, the largest of the inputs"
        remedy = (
            "Take it out, or set `patterns: true` for ranks that differ (PEFT alone reads them)."
        )
        yield Problem("rank", shown(request.rank), expected, remedy)
    if not any(adapter.infos for adapter in adapters):
        yield Problem("models", "adapters without adapted modules", "something to share")


def check(plan: MergePlan) -> Iterator[Problem]:
    """Yield what is wrong with the algorithm and the size, from configurations and headers."""
    if plan.modules and not _varying(plan.request):
        problems = list(_algorithm(plan))
        yield from problems or _size(plan)


def _varying(request: Request) -> list[str]:
    """Return FlexMerge's own parameters that have several values."""
    given = request.parameters
    return [name for name in _NAMES if isinstance(given.get(name), (list, tuple, Mapping))]


def _tasks(request: Request, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Check adapters' names, which become those of folders, and of adapters in one model."""
    seen: dict[str, str] = {}
    for adapter, item in zip(adapters, request.inputs, strict=True):
        if (reason := task_name_problem(adapter.name)) is not None:
            remedy = "Give the adapter another one with `name:`."
            expected = f"a task's name: {reason}"
            yield Problem(f"{item.where}.name", repr(adapter.name), expected, remedy)
        other = seen.setdefault(adapter.name.casefold(), adapter.name)
        if other != adapter.name:
            found = f"{adapter.name!r} beside {other!r}"
            expected = "names that differ in more than case, which name folders"
            yield Problem(f"{item.where}.name", found, expected, "Rename one with `name:`.")


def _lora_biases(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    loras = [adapter for adapter in adapters if isinstance(adapter, LoraAdapter)]
    having = {adapter.name: bool(adapter.config.get("lora_bias")) for adapter in loras}
    if len(set(having.values())) > 1:
        with_bias = [name for name, has in having.items() if has]
        yield Problem(
            "lora_bias",
            f"{listing(with_bias)} with a bias of B, others without",
            "adapters that all have it, or none: PEFT has one setting for all modules of a task",
            "Leave one kind out.",
        )


def _algorithm(plan: MergePlan) -> Iterator[Problem]:
    rule = chosen_rule(plan)
    problems: dict[Problem, None] = {}
    for module in plan.modules:
        values = plan.resolve(module)
        for count in range(2, len(plan.adapters) + 1):
            problems.update(
                dict.fromkeys(rule.check(values.options, Inputs(count, driver=ADAPTERS)))
            )
        for own in values.each:
            problems.update(dict.fromkeys(rule.check_each(own)))
    yield from problems


def _size(plan: MergePlan) -> Iterator[Problem]:
    """Yield the problem of a target that cannot be reached, as far as headers show."""
    if isinstance(plan.rank, (int, NoneType)):
        chosen = options_of(plan)
        storage = storage_of(plan, chosen)
        if problem := storage.problem(chosen.target):
            yield problem


def chosen_rule(plan: MergePlan) -> Method:
    """Return the algorithm of a checked plan."""
    return rules()[str(_value(plan, "algorithm"))]


def options_of(plan: MergePlan) -> Options:
    """Return FlexMerge's own parameters of a checked plan."""
    target = _value(plan, "target_size")
    assert isinstance(target, Target)
    return Options(
        target=target,
        rule=chosen_rule(plan),
        linkage=str(_value(plan, "linkage")),
        order=str(_value(plan, "order")),
        granularity=str(_value(plan, "granularity")),
    )


def _value(plan: MergePlan, name: str) -> Any:
    parameter = next(p for p in OWN if p.name == name)
    given = plan.request.parameters.get(name, parameter.default)
    return parameter.read(given)


def run(plan: MergePlan, events: Dispatcher) -> FlexMerged:
    """See `peft_merge.flexmerge.run.merge`."""
    return merge(plan, options_of(plan), events)
