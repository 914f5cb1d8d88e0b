"""What `algorithm:` takes: FlexMerge's own algorithms and every registered merge method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit import merge_methods
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
)

from mergekit_ext.core.parameters import REQUIRED, Parameter
from mergekit_ext.errors import did_you_mean, shown
from mergekit_ext.flexmerge.algorithm import Algorithm, Declared, Parameters
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.flexmerge.registered import Registered
from mergekit_ext.host.nan_method import RANGES
from mergekit_ext.methods import BLOCKS, methods

# Names mergekit's method where FlexMerge has an algorithm of the same name.
STOCK_PREFIX = "mergekit:"


def registered(name: str) -> MergeMethod | None:
    """Return the merge method that ``algorithm:`` names, if it names one."""
    wanted = name.removeprefix(STOCK_PREFIX)
    return next((m for m in merge_methods.registered_methods() if m.spec.name == wanted), None)


def names() -> list[str]:
    """Return everything that `algorithm:` takes."""
    own = methods(BLOCKS)
    others = (m.spec.name for m in merge_methods.registered_methods())
    stock = (STOCK_PREFIX * (name in own) + name for name in others if name != "flexmerge")
    return [*own, *stock]


def parameters_of(name: str) -> tuple[Parameter, ...]:
    """Return the parameters of an algorithm; none of an unknown one."""
    if name in (own := methods(BLOCKS)):
        return own[name].for_driver(BLOCKS)
    method = registered(name)
    return () if method is None else tuple(map(_parameter, method.spec.parameters))


def _parameter(spec: ParameterSpec) -> Parameter:
    """Return mergekit's declaration as ours.

    A `density` out of (0, 1] would keep everything or nothing without a message.
    """
    kind = RANGES["density"] if spec.name == "density" else spec.value_type
    return Parameter(
        spec.name,
        kind,
        REQUIRED if spec.required else spec.default,
        spec.description or "",
        per_model=spec.scope != ParameterScope.SHARED,
    )


def check_name(name: Any, tasks: int, findings: Findings) -> bool:
    """Report what is wrong with ``algorithm:``; return whether there is one of that name.

    Args:
        name: what the file says.
        tasks: how many models a group may have.
        findings: takes the problems.
    """
    where, known = "parameters.algorithm", names()
    if name not in known:
        expected = f"one of {', '.join(known)}"
        findings.problem(where, shown(name), expected, did_you_mean(str(name), known))
        return False
    if name in methods(BLOCKS):
        return True
    method = registered(name)
    assert method is not None
    contract = method.spec.contract
    most = _most_models(contract)
    if most is not None and most < tasks:
        findings.problem(
            where,
            f"`{name}`, which merges at most {most} models",
            f"an algorithm for groups of up to {tasks}",
            "Use another algorithm.",
        )
    if contract.base == BasePolicy.FORBIDDEN:
        findings.problem(
            where,
            f"`{name}`, which takes no base model",
            "an algorithm that merges task vectors or weights",
            "Use another algorithm.",
        )
    return True


def _most_models(contract: InputContract) -> int | None:
    based = contract.base != BasePolicy.IGNORED
    limits = [] if contract.max_inputs is None else [contract.max_inputs - based]
    if contract.max_non_base is not None:
        limits.append(contract.max_non_base)
    return min(limits, default=None)


def owners(parameter: str) -> list[str]:
    """Return the algorithms that have a parameter: FlexMerge's own, or else registered methods."""
    own = [n for n, m in methods(BLOCKS).items() if _has(m.for_driver(BLOCKS), parameter)]
    others = merge_methods.registered_methods()
    return own or [m.spec.name for m in others if _has(m.spec.parameters, parameter)]


def _has(parameters: Sequence[Any], name: str) -> bool:
    return any(parameter.name == name for parameter in parameters)


def make(name: str, parameters: Parameters, seed: int) -> Algorithm:
    """Return the algorithm with its parameters; `seed` is for methods that draw numbers."""
    if name in (own := methods(BLOCKS)):
        return Declared(own[name], parameters)
    method = registered(name)
    assert method is not None
    return Registered(method, parameters, seed)
