"""The rules: every declared method that makes one adapter, `nan_<method>` included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

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


def of_any_rule(others: Iterable[Parameter] = ()) -> tuple[Parameter, ...]:
    """Return a parameter for each name in some rule or `others`, of any value where they differ."""
    every = (p for rule in rules().values() for p in rule.for_driver(ADAPTERS))
    found: dict[str, Parameter] = {}
    for parameter in (*others, WEIGHT, *every):
        known = found.setdefault(parameter.name, parameter)
        if known != parameter:
            per_model = known.per_model or parameter.per_model
            found[known.name] = Parameter(known.name, Any, None, per_model=per_model)
    return tuple(found.values())
