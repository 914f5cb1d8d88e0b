"""``parameters:`` mappings as they are written: unknown names, wrong values, missing ones.

What depends on the tensors (filters, gradients between valid ends) is in `resolve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mergekit_ext.core.parameters import unfit
from mergekit_ext.errors import did_you_mean, join, shown
from mergekit_ext.host.checks.layout import Group, Settings, all_settings
from mergekit_ext.host.checks.report import Findings

# (where the value must stand, the parameter's name)
Absent = set[tuple[str, str]]


def check_parameters(method: Any, groups: list[Group], findings: Findings) -> Absent:
    """Check every mapping. Returns the required parameters that are not given at all."""
    specs = {spec.name: spec for spec in method.spec.parameters}
    for group, settings in all_settings(groups):
        for name, value in settings.values.items():
            _check_one(method, specs, group, settings, name, value, findings)
    absent: Absent = set()
    for group in groups:
        for spec in method.spec.parameters:
            if spec.required:
                absent |= _check_given(method, spec, group, findings)
    return absent


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any, str | None]]:
    """The scalars of a setting with their paths, and the filter that leads to each."""
    if hasattr(value, "filter") and hasattr(value, "value"):
        for where, leaf, _ in leaves(value.value, f"{path}.value"):
            yield where, leaf, value.filter
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(item, join(path, i))
    else:
        yield path, value, None


def _check_one(
    method: Any,
    specs: dict[str, Any],
    group: Group,
    settings: Settings,
    name: str,
    value: Any,
    findings: Findings,
) -> None:
    from mergekit.merge_methods.base import ParameterScope

    path, spec = join(settings.where, name), specs.get(name)
    if spec is None:
        findings.problem(
            path,
            f"a parameter that `{method.spec.name}` does not have",
            f"one of {', '.join(sorted(specs))}" if specs else "no parameters at all",
            did_you_mean(name, set(specs)),
        )
        return
    if settings.model is not None and spec.scope == ParameterScope.SHARED:
        findings.problem(
            path,
            "a parameter of the whole merge under one model, where mergekit does not read it",
            "it beside the models",
            f"Move `{name}:` to the `parameters:` of the top level.",
        )
    if (
        settings.model is not None
        and spec.scope == ParameterScope.NON_BASE
        and settings.model == group.base
    ):
        findings.note(f"{path} has no effect: {settings.model} is the base of the merge.")
    if value == []:
        findings.problem(
            path, "an empty list", "at least one value", "Fill it in, or remove the parameter."
        )
    for where, leaf, _ in leaves(value, path):
        wrong = unfit(spec.validate, leaf)
        if wrong is not None:
            findings.problem(where, shown(leaf), wrong[0], wrong[1])


def _check_given(method: Any, spec: Any, group: Group, findings: Findings) -> Absent:
    from mergekit.merge_methods.base import BasePolicy, ParameterScope

    name = spec.name
    if any(name in settings.values for settings in group.settings):
        return set()
    if spec.scope == ParameterScope.SHARED:
        findings.problem(
            f"parameters.{name}",
            "nothing",
            f"a value: `{method.spec.name}` has no default for it",
            f"Add `{name}:` under `parameters:`.",
        )
        return {("parameters", name)}
    absent: Absent = set()
    for source in group.sources:
        if source.settings is not None and name in source.settings.values:
            continue
        if source.model == group.base and spec.scope == ParameterScope.NON_BASE:
            continue
        ignored = method.spec.contract.base == BasePolicy.IGNORED and source.implicit
        findings.problem(
            source.where if source.implicit else f"{source.where}.parameters.{name}",
            "nothing",
            f"a value for {source.model}: `{method.spec.name}` has no default for it",
            (
                f"`{method.spec.name}` has no base and merges this model as one more input: remove "
                f"`base_model:`, or list it under `models:` with its `{name}:`."
                if ignored
                else f"Add `{name}:` under the model's `parameters:`, or for all models under the "
                "`parameters:` of the top level."
            ),
        )
        absent.add((source.where, name))
    return absent
