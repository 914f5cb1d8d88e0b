"""Merge methods: rules, which make one adapter module by module, and whole-merge methods.

A whole-merge method decides over all modules together, and may make several adapters (FlexMerge).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_ext.errors import Problem
from mergekit_ext.events import Dispatcher
from peft_merge.rules.base import WEIGHT, Parameter, Rule, rules

if TYPE_CHECKING:
    from peft_merge.adapter import Adapter
    from peft_merge.config.plan import MergePlan
    from peft_merge.config.request import Request


class Result(Protocol):
    """What a merge gives: it can be written, and tells how it came about."""

    @property
    def report(self) -> Mapping[str, Any]:
        """JSON values."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into a folder that does not exist or is empty."""


@dataclass(frozen=True)
class WholeMethod:
    """A method with a way of its own through the modules.

    Attributes:
        name: in YAML.
        parameters: all of them, `WEIGHT` included where it has one, given the settings of the
            whole merge: some choose an algorithm with parameters of its own.
        check: yields what is wrong, before any factor is read.
        run: merges.
        check_inputs: yields what is wrong whatever the parameters are, which may be wrong, too.
    """

    name: str
    parameters: Callable[[Mapping[str, Any]], tuple[Parameter, ...]]
    check: Callable[[MergePlan], Iterable[Problem]]
    run: Callable[[MergePlan, Dispatcher], Result]
    check_inputs: Callable[[Request, Sequence[Adapter]], Iterable[Problem]] = (
        lambda request, adapters: ()
    )


Method = Rule | WholeMethod

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


def methods() -> Mapping[str, Method]:
    """All methods by name, those of the project included."""
    # Each registers itself; here, because they need this module.
    for module in _WHOLE_METHODS:
        importlib.import_module(module)
    return {**rules(), **_WHOLE}


def parameters_of(method: Method, shared: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """All parameters of a method, in the light of the settings of the whole merge."""
    if isinstance(method, WholeMethod):
        return method.parameters(shared)
    return (WEIGHT, *method.parameters)


def of_any_rule() -> dict[str, list[Parameter]]:
    """Every form that a parameter has in some rule, by its name."""
    found: dict[str, list[Parameter]] = {WEIGHT.name: [WEIGHT]}
    for rule in rules().values():
        for parameter in rule.parameters:
            forms = found.setdefault(parameter.name, [])
            if parameter not in forms:
                forms.append(parameter)
    return found
