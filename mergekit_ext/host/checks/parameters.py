"""Inputs and parameters as a method declares them: as written, and as each tensor gets them."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit.merge_methods.base import BasePolicy, InputContract, ParameterScope
from mergekit.parameter_resolver import resolve_parameter
from pydantic import ValidationError

from mergekit_ext.core.parameters import AUTO, unfit
from mergekit_ext.declared import Inputs
from mergekit_ext.declared.method import factor_in
from mergekit_ext.errors import did_you_mean, join, shown
from mergekit_ext.host.checks.copied import OF_MERGES
from mergekit_ext.host.checks.layout import Group, Source, all_parameters
from mergekit_ext.host.checks.plan import PlannedTensor
from mergekit_ext.host.checks.report import Findings
from mergekit_ext.host.method import ExtMethod

# An object that no parameter has as its value: the parameter has none here.
_NOTHING = object()


def check_parameters(
    method: Any, groups: list[Group], planned: Sequence[PlannedTensor], findings: Findings
) -> list[Mapping[str, Any]]:
    """Compare inputs and parameters with what a merge method declares, and ask the method.

    Returns each distinct set of shared parameters that one of the tensors has.
    """
    return _Check(method, findings).run(groups, planned)


def refusal(contract: InputContract, models: Sequence[Any], base: Any) -> str | None:
    """Return mergekit's reason why a method does not take these inputs; None if it does."""
    try:
        contract.validate_ids(models, base)
    except ValueError as error:
        return str(error)
    return None


class _Check:
    def __init__(self, method: Any, findings: Findings):
        self.method, self.findings = method, findings
        self.name = method.spec.name
        self.specs = {spec.name: spec for spec in method.spec.parameters}
        self.wrong: set[str] = set()  # paths of parameters whose values are reported already
        self.combined: set[str] = set()  # inputs whose parameters are reported as a whole
        self.shared: dict[tuple[Any, ...], tuple[Group, dict[str, Any]]] = {}
        # For the models that have a tensor: sums of their weights.
        self.weights = defaultdict[tuple[Any, ...], set[float]](set)

    def run(self, groups: list[Group], planned: Sequence[PlannedTensor]) -> list[Mapping[str, Any]]:
        self.tensors = {w.name for t in planned for w in (t.weight, *t.inputs.values())}
        for group in groups:
            self.inputs(group)
        for where, (group, source, values) in all_parameters(groups).items():
            for name, value in values.items():
                self.written(group, source, join(where, name), name, value)
        for group in groups:
            self.required(group)
        for tensor in planned:
            self.resolve(tensor)
        for group in groups:
            if all(tensor.group is not group for tensor in planned):
                # No model of the group is known: what holds for all tensors.
                self.resolve_shared(group, "", list(group.shared.values()), 0.0)
        if isinstance(self.method, ExtMethod):
            for group, values in self.shared.values():
                count = sum(source.model != group.base for source in group.sources)
                inputs = Inputs(count, group.base in group.by_model, where=group.parameters_at)
                self.findings.extend(self.method.problems(values, inputs))
                for note in self.method.notes(values, inputs):
                    self.findings.note(note)
                self.calibrated(values, inputs)
                self.without_experts(values)
        return [values for _, values in self.shared.values()]

    def calibrated(self, values: Mapping[str, Any], inputs: Inputs) -> None:
        """Note sums of weights that differ, where a factor `auto` takes the difference away."""
        name, based = factor_in(values), inputs.based and not self.method.ignores_base
        acts = values.get(name) == AUTO and (based or name == "lambda")
        if acts and any(len(sums) > 1 for sums in self.weights.values()):
            self.findings.note(
                "`weight` of all models together differs from tensor to tensor, which "
                f"`{name}: {AUTO}` takes away: only ratios of weights count. Where some tensors "
                f"should change less than others, give `{name}` a number."
            )

    def without_experts(self, values: Mapping[str, Any]) -> None:
        """Warn where coefficients for each expert are those for each tensor."""
        known = self.tensors and not any("experts." in name for name in self.tensors)
        if values.get("granularity") == "expert" and known:
            found = "no name of a tensor has `experts.` in it"
            self.findings.warn(f"`granularity: expert` does what `tensor` does: {found}.")

    def inputs(self, group: Group) -> None:
        contract, seen = self.method.spec.contract, dict[Any, str]()
        for source in group.sources:
            if source.model in seen:
                where = f"{source.where}.model"
                found = f"{source.model}, which {seen[source.model]} already names"
                remedy = "Remove one of the two, and give the other the weight of both."
                self.findings.problem(where, found, "each model once in a group", remedy)
            seen.setdefault(source.model, source.where)
        if contract.base == BasePolicy.REQUIRED and group.base is None:
            expected = f"a base model, which `{self.name}` needs"
            remedy = "Add `base_model:`, mostly the model that the others were fine-tuned from."
            self.findings.problem("base_model", "nothing", expected, remedy)
            contract = dataclasses.replace(contract, base=BasePolicy.IGNORED)
        if reason := refusal(contract, list(seen), group.base):
            base = f"the base {group.base}" if group.base is not None else "no base"
            found = f"{len(seen)} model{'s' if len(seen) != 1 else ''}, {base}"
            expected = f"inputs that `{self.name}` takes ({reason})"
            self.findings.problem(group.where, found, expected, "Add or take out models.")

    def written(self, group: Group, source: Source | None, at: str, name: str, value: Any) -> None:
        """Check one parameter in the mapping of `source`, or of the whole group."""
        before, spec, tensors = self.findings.count, self.specs.get(name), self.tensors
        whole = spec.scope == ParameterScope.SHARED if spec else name in OF_MERGES
        if whole and source is not None:
            found = "a parameter of the whole merge under one model, where it is not read"
            remedy = f"Move `{name}:` to the `parameters:` of the top level."
            self.findings.problem(at, found, "it beside the models", remedy)
        elif spec is None and not whole:
            found = f"a parameter that `{self.name}` does not have"
            known = ", ".join(sorted(self.specs))
            expected = f"one of {known}" if known else "no parameters at all"
            remedy = did_you_mean(name, {*self.specs, *OF_MERGES}, listed=True)
            self.findings.problem(at, found, expected, remedy)
        if spec is None:  # `settle_copies` checks those of any merge
            return
        if spec.scope == ParameterScope.NON_BASE and source and source.model == group.base:
            self.findings.warn(f"{at} has no effect: {source.model} is the base of the merge.")
        if value == []:
            remedy = "Fill it in, or remove the parameter."
            self.findings.problem(at, "an empty list", "at least one value", remedy)
        for where, leaf, text in _leaves(value, at):
            if wrong := unfit(spec.validate, leaf):
                self.findings.problem(where, shown(leaf), *wrong)
            if text and text != "*" and tensors and not any(text in tensor for tensor in tensors):
                found = f"the filter {text!r} matches no tensor of the merge"
                self.findings.note(f"{at}: {found} (names look like {min(tensors)}).")
        if self.findings.count > before:
            self.wrong.add(at)

    def required(self, group: Group) -> None:
        """Report required parameters that neither a group nor one of its inputs is given."""
        for spec in self.specs.values():
            name, about = spec.name, f": {spec.description}" if spec.description else ""
            if not spec.required or any(name in values for values in group.shared.values()):
                continue
            remedy = f"Add `{name}:` there, or for all models to `parameters:` at the top level."
            places = {}
            for source in group.sources:
                is_base = source.model == group.base and spec.scope == ParameterScope.NON_BASE
                if source.implicit and not is_base:  # the base would be one more input
                    places[source.where] = "List it under `models:`, or remove `base_model:`."
                elif name not in source.parameters and not is_base:
                    places[f"{source.where}.parameters.{name}"] = remedy
            if spec.scope == ParameterScope.SHARED:
                places = {f"parameters.{name}": f"Add `{name}:`."}
            expected = f"a value for `{name}`: `{self.name}` has no default for it{about}"
            for where, what in places.items():
                self.findings.problem(where, "nothing", expected, what)

    def resolve(self, tensor: PlannedTensor) -> None:
        """Find the values that parameters have for one tensor."""
        group, name = tensor.group, tensor.name
        self.resolve_shared(group, name, tuple(tensor.sources(None)), tensor.t)
        total = 0.0
        for model in tensor.inputs:
            source, given = group.by_model[model], tuple(tensor.sources(model))
            values = {
                spec.name: self.value(
                    spec, given, name, tensor.t, group.written_at(spec.name, source), model
                )
                for spec in self.method.spec.input_parameters
                if model != group.base or spec.scope == ParameterScope.INPUT
            }
            if isinstance(weight := values.get("weight"), float):
                total += abs(weight)
            if isinstance(self.method, ExtMethod) and source.where not in self.combined:
                known = {name: value for name, value in values.items() if value is not _NOTHING}
                for problem in self.method.input_problems(known):
                    self.combined.add(source.where)
                    at = group.written_at(problem.where, source)
                    self.findings.extend([dataclasses.replace(problem, where=at)])
        self.weights[tuple(tensor.inputs)].add(round(total, 9))

    def resolve_shared(self, group: Group, tensor: str, given: Sequence[Any], t: float) -> None:
        values = {
            spec.name: self.value(spec, given, tensor, t, group.written_at(spec.name), None)
            for spec in self.method.spec.shared_parameters
        }
        if _NOTHING not in values.values():
            key = (group.where, *((name, repr(value)) for name, value in values.items()))
            self.shared.setdefault(key, (group, values))

    def value(
        self, spec: Any, given: Sequence[Any], tensor: str, t: float, at: str, model: Any
    ) -> Any:
        is_given = any(spec.name in (values or {}) for values in given)
        if at in self.wrong or (spec.required and not is_given):  # reported as written
            return _NOTHING
        try:
            return resolve_parameter(spec, given, tensor_name=tensor, t=t, model=model)
        except ValidationError as error:
            self.wrong.add(at)
            value = error.errors()[0]["input"]
            expected, remedy = unfit(spec.validate, value) or ("another value", "")
            found = f"{shown(value)} between the values of a gradient, for {tensor}"
            remedy = remedy or "Give one value, or one for each part of the model with `filter:`."
            self.findings.problem(at, found, expected, remedy)
        except RuntimeError:  # a required parameter without a value for this tensor
            if tensor:
                remedy = f"Add an entry without `filter:` at the end of `{spec.name}:`."
                expected = "a value for every tensor"
                self.findings.tensor(tensor, f"no value in {at}", expected, remedy)
        return _NOTHING


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
