"""Parameters as each tensor gets them: holes left by filters, gradients, the method's own rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ext.core.wording import listing, shown, tensors_at
from mergekit_ext.errors import Problem
from mergekit_ext.host.checks.layout import Group, Source, all_settings
from mergekit_ext.host.checks.parameters import Absent, leaves, value_problem
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.checks.survey import PlannedTensor

# An object that no parameter has as its value: the parameter has none here.
_NOTHING = object()


class ParameterResolution:
    """Resolves the parameters of every planned tensor and collects what goes wrong."""

    def __init__(self, method: Any, groups: list[Group], absent: Absent, findings: Findings):
        self._method = method
        self._groups = {group.where: group for group in groups}
        self._absent, self._findings = absent, findings
        self._holes: dict[tuple[str, str], list[str]] = {}
        self._invalid: dict[tuple[str, str, str], dict[str, list[str]]] = {}
        self._shared: dict[tuple[Any, ...], tuple[Group, dict[str, Any]]] = {}
        self._combined: dict[str, Problem] = {}  # the first of each input

    def run(self, planned: Sequence[PlannedTensor]) -> list[Mapping[str, Any]]:
        """Resolve, report, ask the method. Returns each distinct set of shared parameters."""
        seen = set()
        for tensor in planned:
            group = self._groups.get(tensor.group)
            if group is not None:
                seen.add(group.where)
                self._one(group, tensor)
        for where, group in self._groups.items():
            if where not in seen:  # no model of the group is known: what holds for all tensors
                self._shared_of(group, "", [s.values for s in group.settings], 0.0)
        self._report()
        self._report_combined()
        self._ask_method()
        self._filters(planned)
        return [shared for _, shared in self._shared.values()]

    def _one(self, group: Group, tensor: PlannedTensor) -> None:
        from mergekit.merge_methods.base import ParameterScope

        self._shared_of(group, tensor.weight.name, tuple(tensor.sources(None)), tensor.t)
        specs = self._method.spec.input_parameters
        for model, weight in tensor.inputs:
            settings = tuple(tensor.sources(model))
            source = group.source(model)
            values: dict[str, Any] = {}
            for spec in specs:
                if source is None or (model == tensor.base and spec.scope != ParameterScope.INPUT):
                    continue
                if (source.where, spec.name) not in self._absent:
                    at = _written_at(group, source, spec.name)
                    value = self._value(spec, settings, weight.name, tensor.t, at, model)
                    if value is not _NOTHING:
                        values[spec.name] = value
            if source is not None:
                self._ask_of_input(group, source, values)

    def _ask_of_input(self, group: Group, source: Source, values: Mapping[str, Any]) -> None:
        ask = getattr(self._method, "input_problems", None)
        if callable(ask) and source.where not in self._combined:
            for problem in ask(values):
                at = _written_at(group, source, problem.where)
                self._combined[source.where] = dataclasses.replace(problem, where=at)

    def _shared_of(self, group: Group, tensor: str, settings: Sequence[Any], t: float) -> None:
        values: dict[str, Any] = {}
        complete = True
        for spec in self._method.spec.shared_parameters:
            at = _written_at(group, None, spec.name)
            if ("parameters", spec.name) in self._absent:
                complete = False
                continue
            value = self._value(spec, settings, tensor, t, at, None)
            complete = complete and value is not _NOTHING
            values[spec.name] = value
        if complete:
            key = (group.where, *((name, repr(value)) for name, value in values.items()))
            self._shared.setdefault(key, (group, values))

    def _value(
        self, spec: Any, settings: Sequence[Any], tensor: str, t: float, at: str, model: Any
    ) -> Any:
        from mergekit.parameter_resolver import resolve_parameter
        from pydantic import ValidationError

        try:
            return resolve_parameter(spec, settings, tensor_name=tensor, t=t, model=model)
        except ValidationError as error:
            item = error.errors()[0]
            wrong = value_problem(spec, item["input"]) or (str(item["msg"]), "")
            values = self._invalid.setdefault((at, *wrong), {})
            values.setdefault(shown(item["input"]), []).append(tensor)
        except RuntimeError:  # a required parameter without a value for this tensor
            if tensor and not any((mapping or {}).get(spec.name) == [] for mapping in settings):
                self._holes.setdefault((at, spec.name), []).append(tensor)
        return _NOTHING

    def _report(self) -> None:
        for (at, name), tensors in self._holes.items():
            self._findings.problem(
                at,
                f"no value for {tensors_at(list(dict.fromkeys(tensors)))}",
                "a value for every tensor",
                f"Add an entry without `filter:` at the end of `{name}:`.",
            )
        for (at, wanted, remedy), values in self._invalid.items():
            # Values that are wrong as written are reported with their own path already.
            written = self._written(at.rsplit(".", 1)[-1])
            between = {value: names for value, names in values.items() if value not in written}
            if not between:
                continue
            tensors = [name for names in between.values() for name in names]
            self._findings.problem(
                at,
                f"{listing(list(between))} between the values of a gradient, for "
                f"{tensors_at(list(dict.fromkeys(tensors)))}",
                wanted,
                remedy or "Give one value, or one for each part of the model with `filter:`.",
            )

    def _report_combined(self) -> None:
        # What is written once for all models is wrong once.
        self._findings.extend(dict.fromkeys(self._combined.values()))

    def _written(self, name: str) -> set[str]:
        found = set()
        for _, settings in all_settings(list(self._groups.values())):
            if name in settings.values:
                found |= {shown(leaf) for _, leaf, _ in leaves(settings.values[name], "")}
        return found

    def _ask_method(self) -> None:
        problems = getattr(self._method, "problems", None)
        notes = getattr(self._method, "notes", None)
        for group, shared in self._shared.values():
            inputs = [str(s.model) for s in group.sources if s.model != group.base]
            known = {"has_base": group.has_base, "inputs": inputs, "where": group.parameters_at()}
            if callable(problems):
                self._findings.extend(problems(shared, **known))
            if callable(notes):
                for note in notes(shared, **known):
                    self._findings.note(note)

    def _filters(self, planned: Sequence[PlannedTensor]) -> None:
        if not planned:
            return
        names = {tensor.weight.name for tensor in planned}
        names |= {weight.name for tensor in planned for _, weight in tensor.inputs}
        for _, settings in all_settings(list(self._groups.values())):
            for parameter, value in settings.values.items():
                filters = {f for _, _, f in leaves(value, "") if f not in (None, "*")}
                for text in sorted(f for f in filters if f is not None):
                    if not any(text in name for name in names):
                        self._findings.note(
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
