"""The registry of merge methods: rules, and whole-merge methods."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from mergekit_ext.core.parameters import WEIGHT, Parameter
from mergekit_ext.methods import ADAPTERS, Method
from mergekit_ext.methods import methods as declared
from mergekit_ext.methods.nan import with_nan
from peft_merge.config.plan import AnyMethod, WholeMethod

_WHOLE: dict[str, WholeMethod] = {}
_WHOLE_METHODS = ("peft_merge.flexmerge.method",)


def register(method: WholeMethod) -> WholeMethod:
    """Add a whole-merge method under its name.

    Raises:
        ValueError: the name is taken.
    """
    if method.name in methods():
        raise ValueError(f"{method.name}: there is a merge method of this name already")
    _WHOLE[method.name] = method
    return method


def methods() -> Mapping[str, AnyMethod]:
    """Return all methods by name, those of the project included."""
    # Each registers itself; here, because they need this module.
    for module in _WHOLE_METHODS:
        importlib.import_module(module)
    return {**rules(), **_WHOLE}


def rules() -> Mapping[str, Method]:
    """Return every method that makes one adapter module by module, `nan_<method>` included."""
    found = declared(ADAPTERS)
    wrapped = (_with_nan(rule) for rule in found.values() if not rule.nan)
    return {**found, **{rule.name: rule for rule in wrapped}}


@cache
def _with_nan(rule: Method) -> Method:
    return with_nan(rule)


def parameters_of(method: AnyMethod, shared: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Return all parameters of a method, in the light of the settings of the whole merge."""
    if isinstance(method, WholeMethod):
        return method.parameters(shared)
    return method.for_driver(ADAPTERS)


def of_any_rule() -> dict[str, list[Parameter]]:
    """Return every form that a parameter has in some rule, by its name."""
    found: dict[str, list[Parameter]] = {WEIGHT.name: [WEIGHT]}
    for rule in rules().values():
        for parameter in rule.for_driver(ADAPTERS):
            forms = found.setdefault(parameter.name, [])
            if parameter not in forms:
                forms.append(parameter)
    return found


def of_any_method() -> dict[str, list[Parameter]]:
    """Return every form that a parameter has in some method, by its name."""
    found = of_any_rule()
    for method in methods().values():
        if isinstance(method, WholeMethod):
            for parameter in method.parameters({}):
                found.setdefault(parameter.name, []).append(parameter)
    return found
