"""The parameters of `flexmerge` in YAML: its own, and those of the algorithm."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from mergekit_ext.core.parameters import Parameter, Share, choice
from mergekit_ext.errors import did_you_mean, join, listing, shown
from mergekit_ext.flexmerge.algorithm import Algorithm, Dare, Parameters
from mergekit_ext.flexmerge.options import options
from mergekit_ext.flexmerge.target import ANY_SIZE, Target
from mergekit_ext.host.blocks import GRANULARITIES
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge.algorithms import check_name, make, owners, parameters_of
from mergekit_ext.host.flexmerge.registered import Registered
from mergekit_ext.methods import BLOCKS, methods

OWN: tuple[Parameter, ...] = (
    *options(
        Annotated[Target, BeforeValidator(Target.parse)],
        # The default first.
        sorted(GRANULARITIES, key=lambda name: name != "component"),
        "2.25 (models)",
    ),
    Parameter(
        "trim_scope",
        choice("model", "block", "tensor") | None,
        None,
        "what `density` is a share of (default model)",
    ),
    Parameter(
        "similarity_on",
        choice("original", "trimmed"),
        "original",
        "whose similarity: task vectors as they are, or trimmed",
    ),
    Parameter("heads", choice("private", "merged"), "private", "what becomes of task heads"),
    Parameter("dare_density", Share | None, None, "thin task vectors at random (DARE) first"),
    Parameter(
        "task",
        str,
        description="the task's name",
        per_model=True,
        remedy="Write a name, such as `task: digits`.",
    ),
)
_OWN = {parameter.name: parameter for parameter in OWN}
# What only algorithms that trim take.
_OF_TRIMMING = frozenset({"trim_scope", "similarity_on"})


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
    known = check_name(name, len(models), findings)
    # NAN's `granularity` gives way to FlexMerge's: it measures the block.
    specs = {**{p.name: p for p in parameters_of(str(name))}, **_OWN}
    if known:  # of an unknown algorithm the parameters are unknown too
        _unknown(shared, models, specs, str(name), findings)
    top = _values("parameters", shared, specs, findings)
    own = [_values(where, given, specs, findings) for where, given in models]
    _misplaced(own, models, specs, findings)
    _required(specs, shared, models, findings)
    if not known or findings.count > before:
        return None
    full = {n: top.get(n, s.default) for n, s in specs.items() if not s.per_model}
    each = [
        {
            n: given.get(n, top.get(n, s.default))
            for n, s in specs.items()
            if s.per_model and n != "task"
        }
        for given in own
    ]
    scope = full["trim_scope"] or "model"
    made = make(str(name), Parameters(full, each, scope), seed)
    _fit(made, full, top, findings)
    if findings.count > before:
        return None
    if full["dare_density"] is not None:
        made = Dare(made, full["dare_density"], seed)
    tasks = [{**given, "task": values.get("task")} for given, values in zip(each, own, strict=True)]
    return Written(full, tasks, made)


def _unknown(
    shared: Mapping[str, Any],
    models: Sequence[tuple[str, Mapping[str, Any]]],
    specs: Mapping[str, Parameter],
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
    where: str, given: Mapping[str, Any], specs: Mapping[str, Parameter], findings: Findings
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
        wrong = specs[name].problem(value)
        if wrong is not None:
            findings.problem(join(where, name), shown(value), *wrong)
        else:
            found[name] = specs[name].read(value)
    return found


def _misplaced(
    own: Sequence[Mapping[str, Any]],
    models: Sequence[tuple[str, Mapping[str, Any]]],
    specs: Mapping[str, Parameter],
    findings: Findings,
) -> None:
    for (where, _), given in zip(models, own, strict=True):
        for name in given:
            if not specs[name].per_model:
                findings.problem(
                    join(where, name),
                    "a parameter of the whole merge under one model",
                    "it beside the models",
                    f"Move `{name}:` to the `parameters:` of the top level.",
                )


def _required(
    specs: Mapping[str, Parameter],
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
        if not spec.per_model or len(lacking) == len(models):
            value = " 1" if name == "weight" else ""
            remedy = f"Add `{name}:{value}` to the top-level parameters."
            findings.problem(f"parameters.{name}", "nothing", about, remedy)
            continue
        for where in lacking:
            findings.problem(join(where, name), "nothing", about, f"Add `{name}:`.")


def _fit(
    algorithm: Algorithm, full: Mapping[str, Any], given: Mapping[str, Any], findings: Findings
) -> None:
    """Report parameters that contradict each other, or that a registered method refuses."""
    if isinstance(algorithm, Registered):
        problems = algorithm.problems()
        findings.extend(problems)
        for note in () if problems else algorithm.notes():
            findings.note(note)
    if not algorithm.trims:
        for name in sorted(_OF_TRIMMING):
            if given.get(name) not in (None, "original"):
                findings.problem(
                    f"parameters.{name}",
                    shown(given[name]),
                    f"it with an algorithm that trims; `{full['algorithm']}` does not",
                    f"Remove `{name}:`.",
                )
    elif full["dare_density"] is not None and full["trim_scope"] in (None, "model"):
        findings.problem(
            "parameters.trim_scope",
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


def variant(config: Any, algorithm: str, algorithms: Sequence[str]) -> Any:
    """Return the configuration for one of several algorithms, with a size that all reach.

    What only others of `algorithms` take as a parameter is left out: a `density` for TIES does
    not keep EMR from being compared with it. A parameter that none takes stays, to be reported.
    The size that the file asks for is not used.
    """
    elsewhere = frozenset[str]().union(*map(_taken, algorithms))
    left_out = elsewhere - (_OWN.keys() - _OF_TRIMMING) - _taken(algorithm)
    models = [
        item.model_copy(update={"parameters": _without(item.parameters, left_out)})
        for item in config.models or ()
    ]
    count = sum(item.model != config.base_model for item in models)
    method = methods(BLOCKS).get(algorithm)
    parameters = {
        **_without(config.parameters, left_out),
        "algorithm": algorithm,
        # K-means has whole numbers only, a masked merge over a wide base no number at all.
        "target_size": float(max(count, 1)) if method and method.kmeans else ANY_SIZE,
    }
    return config.model_copy(update={"models": models or None, "parameters": parameters})


def _taken(algorithm: str) -> frozenset[str]:
    method = methods(BLOCKS).get(algorithm)
    found = frozenset(parameter.name for parameter in parameters_of(algorithm))
    return found | _OF_TRIMMING if method is not None and method.trims else found


def _without(parameters: Mapping[str, Any] | None, left_out: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in (parameters or {}).items() if name not in left_out}
