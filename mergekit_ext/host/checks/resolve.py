"""Parameters as each tensor gets them: holes left by filters, gradients, the method's own rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ext.core.parameters import unfit
from mergekit_ext.errors import Problem, listing, shown, tensors_at
from mergekit_ext.host.checks.layout import Group, Source, all_settings
from mergekit_ext.host.checks.parameters import Absent, leaves
from mergekit_ext.host.checks.plan import PlannedTensor
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.methods import Inputs

# An object that no parameter has as its value: the parameter has none here.
_NOTHING = object()


def resolve(
    method: Any,
    groups: list[Group],
    absent: Absent,
    planned: Sequence[PlannedTensor],
    findings: Findings,
) -> list[Mapping[str, Any]]:
    """Resolve the parameters of every planned tensor, and ask the method about them.

    Args:
        method: a registered merge method.
        groups: the groups of inputs.
        absent: the required parameters that are not given at all.
        planned: the tensors that are merged.
        findings: where problems go.

    Returns:
        Each distinct set of shared parameters.
    """
    by_place = {group.where: group for group in groups}
    values = _Values(method, absent)
    for tensor in planned:
        if tensor.group in by_place:
            values.resolve(by_place[tensor.group], tensor)
    for group in groups:
        if all(tensor.group != group.where for tensor in planned):
            # No model of the group is known: what holds for all tensors.
            values.resolve_shared(group, "", [s.values for s in group.settings], 0.0)
    values.report(groups, findings)
    _ask_method(method, values.shared.values(), findings)
    _note_filters(groups, planned, findings)
    return [shared for _, shared in values.shared.values()]


class _Values:
    """The values that parameters have for single tensors, and what is wrong with them."""

    def __init__(self, method: Any, absent: Absent):
        self._method, self._absent = method, absent
        self._holes: dict[tuple[str, str], dict[str, None]] = {}
        self._invalid: dict[tuple[str, str, str], dict[str, dict[str, None]]] = {}
        self._combined: dict[str, Problem] = {}  # the first of each input
        self.shared: dict[tuple[Any, ...], tuple[Group, dict[str, Any]]] = {}

    def resolve(self, group: Group, tensor: PlannedTensor) -> None:
        from mergekit.merge_methods.base import ParameterScope

        name = tensor.weight.name
        self.resolve_shared(group, name, tuple(tensor.sources(None)), tensor.t)
        for model, _ in tensor.inputs:
            source = group.source(model)
            if source is None:
                continue
            settings = tuple(tensor.sources(model))
            values = {
                spec.name: self._value(
                    spec, settings, name, tensor.t, _written_at(group, source, spec.name), model
                )
                for spec in self._method.spec.input_parameters
                if (source.where, spec.name) not in self._absent
                and (model != tensor.base or spec.scope == ParameterScope.INPUT)
            }
            self._ask_of_input(group, source, values)

    def _ask_of_input(self, group: Group, source: Source, values: Mapping[str, Any]) -> None:
        ask = getattr(self._method, "input_problems", None)
        if callable(ask) and source.where not in self._combined:
            known = {name: value for name, value in values.items() if value is not _NOTHING}
            for problem in ask(known):
                at = _written_at(group, source, problem.where)
                self._combined[source.where] = dataclasses.replace(problem, where=at)

    def resolve_shared(self, group: Group, tensor: str, settings: Sequence[Any], t: float) -> None:
        values = {
            spec.name: self._value(
                spec, settings, tensor, t, _written_at(group, None, spec.name), None
            )
            for spec in self._method.spec.shared_parameters
        }
        if _NOTHING not in values.values():
            key = (group.where, *((name, repr(value)) for name, value in values.items()))
            self.shared.setdefault(key, (group, values))

    def _value(
        self, spec: Any, settings: Sequence[Any], tensor: str, t: float, at: str, model: Any
    ) -> Any:
        from mergekit.parameter_resolver import resolve_parameter
        from pydantic import ValidationError

        if model is None and ("parameters", spec.name) in self._absent:
            return _NOTHING
        try:
            return resolve_parameter(spec, settings, tensor_name=tensor, t=t, model=model)
        except ValidationError as error:
            item = error.errors()[0]
            wrong = unfit(spec.validate, item["input"]) or (str(item["msg"]), "")
            values = self._invalid.setdefault((at, *wrong), {})
            values.setdefault(shown(item["input"]), {})[tensor] = None
        except RuntimeError:  # a required parameter without a value for this tensor
            if tensor and not any((mapping or {}).get(spec.name) == [] for mapping in settings):
                self._holes.setdefault((at, spec.name), {})[tensor] = None
        return _NOTHING

    def report(self, groups: list[Group], findings: Findings) -> None:
        for (at, name), tensors in self._holes.items():
            findings.problem(
                at,
                f"no value for {tensors_at(list(tensors))}",
                "a value for every tensor",
                f"Add an entry without `filter:` at the end of `{name}:`.",
            )
        for (at, wanted, remedy), values in self._invalid.items():
            # Values that are wrong as written are reported with their own path already.
            written = {
                shown(leaf)
                for _, settings in all_settings(groups)
                for _, leaf, _ in leaves(settings.values.get(at.rpartition(".")[2], []), "")
            }
            between = {value: names for value, names in values.items() if value not in written}
            names = {name: None for found in between.values() for name in found}
            if between:
                findings.problem(
                    at,
                    f"{listing(list(between))} between the values of a gradient, for "
                    f"{tensors_at(list(names))}",
                    wanted,
                    remedy or "Give one value, or one for each part of the model with `filter:`.",
                )
        # What is written once for all models is wrong once.
        findings.extend(self._combined.values())


def _ask_method(method: Any, shared: Any, findings: Findings) -> None:
    if not hasattr(method, "notes"):  # mergekit's own
        return
    for group, values in shared:
        count = sum(source.model != group.base for source in group.sources)
        inputs = Inputs(count, group.has_base, where=group.parameters_at())
        findings.extend(method.problems(values, inputs))
        for note in method.notes(values, inputs):
            findings.note(note)


def _note_filters(
    groups: list[Group], planned: Sequence[PlannedTensor], findings: Findings
) -> None:
    names = {tensor.weight.name for tensor in planned}
    names |= {weight.name for tensor in planned for _, weight in tensor.inputs}
    for _, settings in all_settings(groups) if names else ():
        for parameter, value in settings.values.items():
            filters = {f for _, _, f in leaves(value, "") if f is not None and f != "*"}
            for text in sorted(filters):
                if not any(text in name for name in names):
                    findings.note(
                        f"{settings.where}.{parameter}: the filter {text!r} matches no tensor "
                        f"of the merge (names look like {min(names)})."
                    )


def _written_at(group: Group, source: Source | None, name: str) -> str:
    """The path of the setting that decides a parameter, which others above it may complete."""
    mappings = [*group.settings]
    if source is not None and source.settings is not None:
        mappings.insert(0, source.settings)
    where = next((m.where for m in mappings if name in m.values), group.parameters_at())
    return f"{where}.{name}"
