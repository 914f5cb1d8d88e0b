"""The rules: every declared method that makes one adapter, `nan_<method>` included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from mergekit_ext.core.parameters import WEIGHT, Parameter
from mergekit_ext.methods import ADAPTERS, Method
from mergekit_ext.methods import methods as declared
from mergekit_ext.methods.nan import with_nan


def rules() -> Mapping[str, Method]:
    """Return every method that makes one adapter module by module, `nan_<method>` included."""
    found = declared(ADAPTERS)
    wrapped = (_with_nan(rule) for rule in found.values() if not rule.nan)
    return {**found, **{rule.name: rule for rule in wrapped}}


@cache
def _with_nan(rule: Method) -> Method:
    return with_nan(rule)


def of_any_rule() -> dict[str, list[Parameter]]:
    """Return every form that a parameter has in some rule, by its name."""
    found: dict[str, list[Parameter]] = {WEIGHT.name: [WEIGHT]}
    for rule in rules().values():
        for parameter in rule.for_driver(ADAPTERS):
            forms = found.setdefault(parameter.name, [])
            if parameter not in forms:
                forms.append(parameter)
    return found
