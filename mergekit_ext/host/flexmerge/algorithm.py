"""What `algorithm:` takes: FlexMerge's own algorithms and every registered merge method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any

from mergekit import merge_methods
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
)
from pydantic import Field

from mergekit_ext.core.wording import did_you_mean, shown
from mergekit_ext.flexmerge.algorithms import ALGORITHMS
from mergekit_ext.flexmerge.algorithms.base import Algorithm, Option, Parameters
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge.registered import Registered

# Names mergekit's method where FlexMerge has an algorithm of the same name.
STOCK_PREFIX = "mergekit:"
Share = Annotated[float, Field(gt=0, le=1)]


def registered(name: str) -> MergeMethod | None:
    """The merge method that ``algorithm:`` names, if it names one."""
    wanted = name.removeprefix(STOCK_PREFIX)
    return next((m for m in merge_methods.registered_methods() if m.spec.name == wanted), None)


def algorithm_names() -> list[str]:
    """Everything that `algorithm:` takes."""
    methods = [
        m.spec.name for m in merge_methods.registered_methods() if m.spec.name != "flexmerge"
    ]
    return [*ALGORITHMS, *(STOCK_PREFIX * (name in ALGORITHMS) + name for name in methods)]


def algorithm_specs(
    name: Any, tasks: int, reserved: Collection[str], findings: Findings
) -> dict[str, ParameterSpec] | None:
    """The parameters of the algorithm `name`; None, with a problem, if there is none.

    Args:
        name: what the file says.
        tasks: how many models a group may have.
        reserved: `flexmerge`'s own parameters, to which a method's of the same name give way.
        findings: takes the problems.
    """
    known = algorithm_names()
    if name not in known:
        remedy = did_you_mean(str(name), known)
        findings.problem("parameters.algorithm", shown(name), f"one of {', '.join(known)}", remedy)
        return None
    if name in ALGORITHMS:
        return {option.name: _spec(option) for option in ALGORITHMS[name].options}
    method = registered(name)
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
    return {
        spec.name: _bounded(spec) for spec in method.spec.parameters if spec.name not in reserved
    }


def _bounded(spec: ParameterSpec) -> ParameterSpec:
    """A `density` out of (0, 1] keeps everything or nothing, and mergekit says so nowhere."""
    return replace(spec, value_type=Share) if spec.name == "density" else spec


def _most_models(contract: InputContract) -> int | None:
    based = contract.base != BasePolicy.IGNORED
    limits = [] if contract.max_inputs is None else [contract.max_inputs - based]
    if contract.max_non_base is not None:
        limits.append(contract.max_non_base)
    return min(limits, default=None)


def _spec(option: Option) -> ParameterSpec:
    scope = ParameterScope.NON_BASE if option.per_model else ParameterScope.SHARED
    return ParameterSpec(option.name, option.annotation, scope, option.default, option.description)


def owners(parameter: str) -> list[str]:
    """The algorithms that have a parameter: FlexMerge's own, or else registered methods."""
    own = [
        name
        for name, kind in ALGORITHMS.items()
        if any(option.name == parameter for option in kind.options)
    ]
    return own or [
        method.spec.name
        for method in merge_methods.registered_methods()
        if any(spec.name == parameter for spec in method.spec.parameters)
    ]


def make(
    name: str, parameters: Parameters, specs: Mapping[str, ParameterSpec], seed: int
) -> Algorithm:
    """The algorithm with its parameters.

    Args:
        name: as in YAML.
        parameters: of this merge.
        specs: those of `algorithm_specs`.
        seed: for methods that draw random numbers.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name](parameters)
    method = registered(name)
    assert method is not None
    return Registered(method, parameters, specs, seed)
