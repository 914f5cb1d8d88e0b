"""Inputs and parameters as a method declares them: as written, and as each tensor gets them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit.merge_methods.base import BasePolicy, ParameterScope
from mergekit.parameter_resolver import resolve_parameter
from pydantic import ValidationError

from mergekit_ext.core.parameters import unfit
from mergekit_ext.errors import did_you_mean, join, shown
from mergekit_ext.host.checks.layout import Group, Source, all_parameters
from mergekit_ext.host.checks.plan import PlannedTensor
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.methods import Inputs


def check_parameters(
    method: Any, groups: list[Group], planned: Sequence[PlannedTensor], findings: Findings
) -> list[Mapping[str, Any]]:
    """Compare inputs and parameters with what a registered method declares, and ask the method.

    Args:
        method: a registered merge method.
        groups: the groups of inputs.
        planned: the tensors that are merged.
        findings: where problems go.

    Returns:
        Each distinct set of shared parameters.
    """
    for group in groups:
        _check_inputs(method, group, findings)
    wrong = {
        join(where, name)
        for where, (group, source, values) in all_parameters(groups).items()
        for name, value in values.items()
        if not _is_sound(method, group, source, join(where, name), name, value, findings)
    }
    for group in groups:
        for spec in method.spec.parameters:
            if spec.required and all(spec.name not in values for values in group.shared.values()):
                _check_given(method, spec, group, findings)
    resolved = _Resolved(method, wrong, findings)
    for tensor in planned:
        resolved.add(tensor)
    for group in groups:
        if all(tensor.group.where != group.where for tensor in planned):
            # No model of the group is known: what holds for all tensors.
            resolved.add_shared(group, "", list(group.shared.values()), 0.0)
    if isinstance(method, ExtMethod):
        _ask(method, resolved.shared.values(), findings)
    _note_filters(groups, planned, findings)
    return [values for _, values in resolved.shared.values()]


def _check_inputs(method: Any, group: Group, findings: Findings) -> None:
    contract, name = method.spec.contract, method.spec.name
    seen: dict[Any, str] = {}
    for source in group.sources:
        if source.model in seen:
            findings.problem(
                f"{source.where}.model",
                f"{source.model}, which {seen[source.model]} already names",
                "each model once in a group of inputs",
                "Remove one of the two, and give the other the weight of both.",
            )
        seen.setdefault(source.model, source.where)
    # A method that ignores the base sees the base as one more ordinary input.
    base = None if contract.base == BasePolicy.IGNORED else group.base
    if base is not None and not group.has_base:
        findings.problem(
            f"{group.where}.sources",
            f"no source of the base model {base}",
            "the base among the sources of the slice",
            "Add a source with that model and the same number of layers.",
        )
    elif contract.base == BasePolicy.REQUIRED and base is None:
        findings.problem(
            "base_model",
            "nothing",
            f"a base model, which `{name}` needs",
            "Add `base_model:`, for most methods the model that the others were fine-tuned from.",
        )
    elif contract.base == BasePolicy.FORBIDDEN and base is not None:
        expected = f"no base model: `{name}` does not take one"
        findings.problem("base_model", str(base), expected, "Remove `base_model:`.")
    based = base is not None and group.has_base
    limits = (
        (len(seen), ", the base among them", contract.min_inputs, contract.max_inputs),
        (len(seen) - based, " besides the base", contract.min_non_base, contract.max_non_base),
    )
    for count, aside, least, most in limits:
        least = least or 0
        if count < least or (most is not None and count > most):
            few = count < least
            bound = f"{'exactly' if least == most else 'at least' if few else 'at most'} "
            findings.problem(
                group.where,
                f"{_models(count)}{aside if based else ''}",
                f"{bound}{_models(least if few else most)} for `{name}`",
                "Add models." if few else "Take out models.",
            )


def _models(count: int) -> str:
    return f"{count} model{'s' if count != 1 else ''}"


def _is_sound(
    method: Any,
    group: Group,
    source: Source | None,
    path: str,
    name: str,
    value: Any,
    findings: Findings,
) -> bool:
    """Check one parameter as it is written, in the mapping of `source` or of the whole group."""
    specs = {spec.name: spec for spec in method.spec.parameters}
    before, spec = findings.count, specs.get(name)
    if spec is None:
        findings.problem(
            path,
            f"a parameter that `{method.spec.name}` does not have",
            f"one of {', '.join(sorted(specs))}" if specs else "no parameters at all",
            did_you_mean(name, specs),
        )
        return False
    if source is not None and spec.scope == ParameterScope.SHARED:
        findings.problem(
            path,
            "a parameter of the whole merge under one model, where mergekit does not read it",
            "it beside the models",
            f"Move `{name}:` to the `parameters:` of the top level.",
        )
    elif spec.scope == ParameterScope.NON_BASE and source and source.model == group.base:
        findings.note(f"{path} has no effect: {source.model} is the base of the merge.")
    if value == []:
        remedy = "Fill it in, or remove the parameter."
        findings.problem(path, "an empty list", "at least one value", remedy)
    for where, leaf, _ in _leaves(value, path):
        if wrong := unfit(spec.validate, leaf):
            findings.problem(where, shown(leaf), *wrong)
    return findings.count == before


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any, str | None]]:
    """The scalars of a setting with their paths, and the filter that leads to each."""
    if hasattr(value, "filter") and hasattr(value, "value"):
        for where, leaf, _ in _leaves(value.value, f"{path}.value"):
            yield where, leaf, value.filter
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, join(path, i))
    else:
        yield path, value, None


def _check_given(method: Any, spec: Any, group: Group, findings: Findings) -> None:
    """Report a required parameter that neither the group nor one of its inputs is given."""
    name, title = spec.name, method.spec.name
    if spec.scope == ParameterScope.SHARED:
        expected = f"a value: `{title}` has no default for it"
        remedy = f"Add `{name}:` under `parameters:`."
        findings.problem(f"parameters.{name}", "nothing", expected, remedy)
        return
    for source in group.sources:
        is_base = source.model == group.base and spec.scope == ParameterScope.NON_BASE
        if name not in source.parameters and not is_base:
            findings.problem(
                source.where if source.implicit else f"{source.where}.parameters.{name}",
                "nothing",
                f"a value for {source.model}: `{title}` has no default for it",
                f"List the model under `models:` with its `{name}:`, or remove `base_model:` if "
                f"`{title}` needs none: it would be merged as one more input."
                if source.implicit
                else f"Add `{name}:` under the model's `parameters:`, or for all models under the "
                "`parameters:` of the top level.",
            )


# An object that no parameter has as its value: the parameter has none here.
_NOTHING = object()


class _Resolved:
    """The values that parameters have for single tensors.

    `wrong` are the paths of parameters whose values are reported already.
    """

    def __init__(self, method: Any, wrong: set[str], findings: Findings):
        self._method, self._wrong, self._findings = method, wrong, findings
        self._combined: set[str] = set()  # inputs whose parameters are reported as a whole
        self.shared: dict[tuple[Any, ...], tuple[Group, dict[str, Any]]] = {}

    def add(self, tensor: PlannedTensor) -> None:
        group, name = tensor.group, tensor.name
        self.add_shared(group, name, tuple(tensor.sources(None)), tensor.t)
        for model, _ in tensor.inputs:
            source, given = group.by_model[model], tuple(tensor.sources(model))
            values = {
                spec.name: self._value(
                    spec, given, name, tensor.t, group.written_at(spec.name, source), model
                )
                for spec in self._method.spec.input_parameters
                if model != group.base or spec.scope == ParameterScope.INPUT
            }
            if isinstance(self._method, ExtMethod) and source.where not in self._combined:
                known = {name: value for name, value in values.items() if value is not _NOTHING}
                for problem in self._method.input_problems(known):
                    self._combined.add(source.where)
                    at = group.written_at(problem.where, source)
                    self._findings.extend([dataclasses.replace(problem, where=at)])

    def add_shared(self, group: Group, tensor: str, given: Sequence[Any], t: float) -> None:
        values = {
            spec.name: self._value(spec, given, tensor, t, group.written_at(spec.name), None)
            for spec in self._method.spec.shared_parameters
        }
        if _NOTHING not in values.values():
            key = (group.where, *((name, repr(value)) for name, value in values.items()))
            self.shared.setdefault(key, (group, values))

    def _value(
        self, spec: Any, given: Sequence[Any], tensor: str, t: float, at: str, model: Any
    ) -> Any:
        written = any(spec.name in (values or {}) for values in given)
        if at in self._wrong or (spec.required and not written):  # reported as written
            return _NOTHING
        try:
            return resolve_parameter(spec, given, tensor_name=tensor, t=t, model=model)
        except ValidationError as error:
            self._wrong.add(at)
            value = error.errors()[0]["input"]
            expected, remedy = unfit(spec.validate, value) or ("another value", "")
            self._findings.problem(
                at,
                f"{shown(value)} between the values of a gradient, for {tensor}",
                expected,
                remedy or "Give one value, or one for each part of the model with `filter:`.",
            )
        except RuntimeError:  # a required parameter without a value for this tensor
            if tensor:
                remedy = f"Add an entry without `filter:` at the end of `{spec.name}:`."
                expected = "a value for every tensor"
                self._findings.tensor(tensor, f"no value in {at}", expected, remedy)
        return _NOTHING


def _ask(method: ExtMethod, shared: Any, findings: Findings) -> None:
    for group, values in shared:
        count = sum(source.model != group.base for source in group.sources)
        inputs = Inputs(count, group.has_base, where=group.parameters_at)
        findings.extend(method.problems(values, inputs))
        for note in method.notes(values, inputs):
            findings.note(note)


def _note_filters(
    groups: list[Group], planned: Sequence[PlannedTensor], findings: Findings
) -> None:
    names = {tensor.name for tensor in planned}
    names |= {weight.name for tensor in planned for _, weight in tensor.inputs}
    for where, (_, _, values) in all_parameters(groups).items():
        for parameter, value in values.items():
            filters = {f for _, _, f in _leaves(value, "") if f is not None and f != "*"}
            for text in sorted(filters):
                if names and not any(text in name for name in names):
                    findings.note(
                        f"{where}.{parameter}: the filter {text!r} matches no tensor of the "
                        f"merge (names look like {min(names)})."
                    )
