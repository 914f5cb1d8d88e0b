"""The parameters of `flexmerge` in YAML: its own, and those of the algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import BeforeValidator

from mergekit_ext.core.wording import did_you_mean, join, listing, shown
from mergekit_ext.flexmerge.algorithms.base import Algorithm, Parameters
from mergekit_ext.flexmerge.algorithms.preprocessing import Dare
from mergekit_ext.flexmerge.target import Target
from mergekit_ext.host.blocks import GRANULARITIES
from mergekit_ext.host.checks.parameters import value_problem
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge.algorithm import Share, algorithm_specs, make, owners
from mergekit_ext.host.flexmerge.fit import check_fit
from mergekit_ext.kernels.grouping import LINKAGES, ORDERS

TargetSize = Annotated[Target, BeforeValidator(Target.parse)]


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
# Where the nearest of the words in an error's text is no help.
_REMEDIES = {
    "target_size": "Write 2.25, or a budget such as '12GB'.",
    "task": "Write a name, such as `task: digits`.",
}


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
        seed: for `dare_density`, and for methods that draw random numbers.
        findings: takes the problems.
    """
    before = findings.count
    name = shared.get("algorithm", _OWN["algorithm"].default)
    algorithm = algorithm_specs(name, len(models), _OWN, findings)
    specs = {**_OWN, **(algorithm or {})}
    if algorithm is not None:  # of an unknown algorithm the parameters are unknown too
        _unknown(shared, models, specs, str(name), findings)
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
    scope = full["trim_scope"] or "model"
    made = make(str(name), Parameters(full, each, scope), algorithm, seed)
    check_fit(made, full, top, findings)
    if findings.count > before:
        return None
    if full["dare_density"] is not None:
        made = Dare(made, full["dare_density"], seed)
    tasks = [{**given, "task": values.get("task")} for given, values in zip(each, own, strict=True)]
    return Written(full, tasks, made)


def _unknown(
    shared: Mapping[str, Any],
    models: Sequence[tuple[str, Mapping[str, Any]]],
    specs: Mapping[str, ParameterSpec],
    algorithm: str,
    findings: Findings,
) -> None:
    for where, given in (("parameters", shared), *models):
        for name in given:
            if name in specs:
                continue
            elsewhere = owners(name)
            findings.problem(
                join(where, name),
                f"a parameter that neither `flexmerge` nor the algorithm `{algorithm}` has",
                f"one of {', '.join(sorted(specs))}",
                f"`{name}` belongs to {listing(elsewhere)}: take it out, or change `algorithm:`."
                if elsewhere
                else did_you_mean(name, set(specs)),
            )


def _values(
    where: str, given: Mapping[str, Any], specs: Mapping[str, ParameterSpec], findings: Findings
) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        if name not in specs:
            continue
        if name != "task" and (isinstance(value, list) or hasattr(value, "filter")):
            findings.problem(
                join(where, name),
                shown(value),
                "one value: `flexmerge` has no gradients and filters",
                "Write one value for all tensors.",
            )
            continue
        wrong = value_problem(specs[name], value)
        if wrong is not None:
            remedy = _REMEDIES.get(name, wrong[1])
            findings.problem(join(where, name), shown(value), wrong[0], remedy)
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
        about = f"a value: {spec.description or f'`{name}` has no default'}"
        lacking = [where for where, given in models if name not in given]
        if spec.scope == ParameterScope.SHARED or len(lacking) == len(models):
            value = " 1" if name == "weight" else ""
            remedy = f"Add `{name}:{value}` to the top-level parameters."
            findings.problem(f"parameters.{name}", "nothing", about, remedy)
            continue
        for where in lacking:
            findings.problem(join(where, name), "nothing", about, f"Add `{name}:`.")


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
