"""The parameters of `flexmerge` in YAML: its own, and those of the algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mergekit import merge_methods
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
)
from pydantic import BeforeValidator, Field

from mergekit_ext.flexmerge.algorithms import ALGORITHMS
from mergekit_ext.flexmerge.algorithms.base import Algorithm, Option, Parameters
from mergekit_ext.flexmerge.algorithms.preprocessing import Dare
from mergekit_ext.flexmerge.target import Target
from mergekit_ext.host.blocks import GRANULARITIES
from mergekit_ext.host.checks.parameters import value_problem
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.support import did_you_mean, join, shown
from mergekit_ext.host.flexmerge.registered import Registered
from mergekit_ext.kernels.grouping import LINKAGES, ORDERS

# Names mergekit's method where FlexMerge has an algorithm of the same name.
STOCK_PREFIX = "mergekit:"

TargetSize = Annotated[Target, BeforeValidator(Target.parse)]
Share = Annotated[float, Field(gt=0, le=1)]


def _choice(names: Sequence[str]) -> Any:
    return Literal[tuple(names)]


def _shared(name: str, kind: Any, default: Any, description: str) -> ParameterSpec:
    return ParameterSpec(name, kind, ParameterScope.SHARED, default, description)


OWN: tuple[ParameterSpec, ...] = (
    ParameterSpec(
        "target_size",
        TargetSize,
        ParameterScope.SHARED,
        description="what the models may occupy: 2.25 (models), 12000000000 or '12GB' (bytes)",
    ),
    _shared("algorithm", str, "task_arithmetic", "how the members of a group are merged"),
    _shared("granularity", _choice(list(GRANULARITIES)), "component", "what a block is"),
    _shared("linkage", _choice(list(LINKAGES)), "min", "similarity of two groups"),
    _shared("order", _choice(list(ORDERS)), "greedy", "which blocks are merged first"),
    _shared(
        "trim_scope",
        Literal["model", "block", "tensor"] | None,
        None,
        "what `density` is a share of (default model)",
    ),
    _shared(
        "similarity_on",
        Literal["original", "trimmed"],
        "original",
        "whose similarity: task vectors as they are, or trimmed",
    ),
    _shared("heads", Literal["private", "merged"], "private", "what becomes of task heads"),
    _shared("dare_density", Share | None, None, "thin task vectors at random (DARE) first"),
    ParameterSpec("task", str, ParameterScope.NON_BASE, description="the task's name"),
)
_OWN = {spec.name: spec for spec in OWN}


@dataclass(frozen=True)
class Written:
    """Parameters as they stand in the file, all of them valid.

    Attributes:
        shared: those of the whole merge, defaults filled in.
        models: for each model its own, by name.
        algorithm: the algorithm, made of them.
    """

    shared: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    algorithm: Algorithm


def read_parameters(
    shared: Mapping[str, Any],
    models: Sequence[tuple[str, Mapping[str, Any]]],
    seed: int,
    findings: Findings,
) -> Written | None:
    """Check every parameter; None if one of them is wrong.

    Args:
        shared: the ``parameters:`` of the top level.
        models: for each task the path of its ``parameters:``, and their values.
        seed: for `dare_density`.
        findings: takes the problems.
    """
    before = findings.count
    name = shared.get("algorithm", _OWN["algorithm"].default)
    algorithm = _algorithm_specs(name, len(models), findings)
    specs = {**_OWN, **(algorithm or {})}
    _unknown(shared, models, specs, algorithm is not None, findings)
    top = _values("parameters", shared, specs, findings)
    own = [_values(where, given, specs, findings) for where, given in models]
    _misplaced(own, models, specs, findings)
    _required(specs, shared, models, findings)
    if algorithm is None or findings.count > before:
        return None
    full = {n: top.get(n, s.default) for n, s in specs.items() if s.scope == ParameterScope.SHARED}
    each = [
        {
            n: given.get(n, top.get(n, s.default))
            for n, s in specs.items()
            if s.scope != ParameterScope.SHARED and n != "task"
        }
        for given in own
    ]
    made = _make(str(name), full, each, seed, algorithm)
    _fits(made, full, top, findings)
    if findings.count > before:
        return None
    tasks = [{**given, "task": values.get("task")} for given, values in zip(each, own, strict=True)]
    return Written(full, tasks, made)


def _registered(name: str) -> MergeMethod | None:
    wanted = name.removeprefix(STOCK_PREFIX)
    return next((m for m in merge_methods.registered_methods() if m.spec.name == wanted), None)


def algorithm_names() -> list[str]:
    """Everything that `algorithm:` takes."""
    methods = [
        m.spec.name for m in merge_methods.registered_methods() if m.spec.name != "flexmerge"
    ]
    return [*ALGORITHMS, *(STOCK_PREFIX * (name in ALGORITHMS) + name for name in methods)]


def _algorithm_specs(name: Any, tasks: int, findings: Findings) -> dict[str, ParameterSpec] | None:
    known = algorithm_names()
    if name not in known:
        remedy = did_you_mean(str(name), known)
        findings.problem("parameters.algorithm", shown(name), f"one of {', '.join(known)}", remedy)
        return None
    if name in ALGORITHMS:
        return {option.name: _spec(option) for option in ALGORITHMS[name].options}
    method = _registered(name)
    assert method is not None
    contract = method.spec.contract
    most = _most_models(contract)
    if most is not None and most < tasks:
        findings.problem(
            "parameters.algorithm",
            f"`{name}`, which merges at most {most} models",
            f"an algorithm for groups of up to {tasks}",
            "Use another algorithm.",
        )
    if contract.base == BasePolicy.FORBIDDEN:
        findings.problem(
            "parameters.algorithm",
            f"`{name}`, which takes no base model",
            "an algorithm that merges task vectors or weights",
            "Use another algorithm.",
        )
    # NAN's `granularity` gives way to FlexMerge's: it measures the block.
    return {spec.name: spec for spec in method.spec.parameters if spec.name not in _OWN}


def _most_models(contract: InputContract) -> int | None:
    based = contract.base != BasePolicy.IGNORED
    limits = [] if contract.max_inputs is None else [contract.max_inputs - based]
    if contract.max_non_base is not None:
        limits.append(contract.max_non_base)
    return min(limits, default=None)


def _spec(option: Option) -> ParameterSpec:
    scope = ParameterScope.NON_BASE if option.per_model else ParameterScope.SHARED
    return ParameterSpec(option.name, option.annotation, scope, option.default, option.description)


def _unknown(
    shared: Mapping[str, Any],
    models: Sequence[tuple[str, Mapping[str, Any]]],
    specs: Mapping[str, ParameterSpec],
    complete: bool,
    findings: Findings,
) -> None:
    for where, given in (("parameters", shared), *models):
        for name in given:
            # Of an unknown algorithm the parameters are unknown too: one problem is enough.
            if name not in specs and complete:
                findings.problem(
                    join(where, name),
                    "a parameter that neither `flexmerge` nor the algorithm has",
                    f"one of {', '.join(sorted(specs))}",
                    did_you_mean(name, set(specs)),
                )


def _values(
    where: str, given: Mapping[str, Any], specs: Mapping[str, ParameterSpec], findings: Findings
) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        if name not in specs:
            continue
        if isinstance(value, list) or hasattr(value, "filter"):
            findings.problem(
                join(where, name),
                shown(value),
                "one value: `flexmerge` has no gradients and filters",
                "Write one value for all tensors.",
            )
            continue
        wrong = value_problem(specs[name], value)
        if wrong is not None:
            findings.problem(join(where, name), shown(value), wrong[0], wrong[1])
        else:
            found[name] = specs[name].validate(value)
    return found


def _misplaced(
    own: Sequence[Mapping[str, Any]],
    models: Sequence[tuple[str, Mapping[str, Any]]],
    specs: Mapping[str, ParameterSpec],
    findings: Findings,
) -> None:
    for (where, _), given in zip(models, own, strict=True):
        for name in given:
            if specs[name].scope == ParameterScope.SHARED:
                findings.problem(
                    join(where, name),
                    "a parameter of the whole merge under one model",
                    "it beside the models",
                    f"Move `{name}:` to the `parameters:` of the top level.",
                )


def _required(
    specs: Mapping[str, ParameterSpec],
    shared: Mapping[str, Any],
    models: Sequence[tuple[str, Mapping[str, Any]]],
    findings: Findings,
) -> None:
    if "task" in shared:
        findings.problem(
            "parameters.task", shown(shared["task"]), "a name for each model", "Move it there."
        )
    for name, spec in specs.items():
        if not spec.required or name in shared or name == "task":
            continue
        places = [("parameters", shared)] if spec.scope == ParameterScope.SHARED else models
        for where, given in places:
            if name not in given:
                about = spec.description or f"`{name}` has no default"
                findings.problem(
                    join(where, name), "nothing", f"a value: {about}", f"Add `{name}:`."
                )


def _make(
    name: str,
    shared: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    seed: int,
    specs: Mapping[str, ParameterSpec],
) -> Algorithm:
    scope = shared["trim_scope"] or "model"
    if name in ALGORITHMS:
        algorithm: Algorithm = ALGORITHMS[name](Parameters(shared, models, scope))
    else:
        method = _registered(name)
        assert method is not None
        algorithm = Registered(method, Parameters(shared, models, scope), specs)
    density = shared["dare_density"]
    return algorithm if density is None else Dare(algorithm, density, seed)


def _fits(
    algorithm: Algorithm, full: Mapping[str, Any], given: Mapping[str, Any], findings: Findings
) -> None:
    """Parameters that contradict each other."""
    where = "parameters.trim_scope"
    if not algorithm.trims:
        for name in ("trim_scope", "similarity_on"):
            if given.get(name) not in (None, "original"):
                findings.problem(
                    f"parameters.{name}",
                    shown(given[name]),
                    f"it with an algorithm that trims; `{full['algorithm']}` does not",
                    f"Remove `{name}:`.",
                )
    elif full["dare_density"] is not None and full["trim_scope"] in (None, "model"):
        findings.problem(
            where,
            "the scope `model` together with `dare_density`, which changes every magnitude",
            "`block` or `tensor`",
            "Write `trim_scope: block`.",
        )


def for_manifest(written: Written, tasks: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of the method: every parameter that acted."""
    shared = {
        name: str(value) if isinstance(value, Target) else value
        for name, value in written.shared.items()
        if value is not None
    }
    models = {
        task: {name: value for name, value in given.items() if name != "task"}
        for task, given in zip(tasks, written.models, strict=True)
    }
    return {**shared, "models": models}
