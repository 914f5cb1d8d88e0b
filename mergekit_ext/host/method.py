"""The project's merge methods as mergekit's: what they have in common, and those declared."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from mergekit import merge_methods
from mergekit.merge_methods import base as api
from mergekit.merge_methods.base import BasePolicy, MergeMethod, ParameterScope, TensorGroup
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype
from torch import Tensor

from mergekit_ext.core.parameters import AUTO, Parameter, Values
from mergekit_ext.declared import MODELS, Call, Inputs, Merged, Method
from mergekit_ext.declared.method import factor_in, layout_of
from mergekit_ext.errors import MergeError, MergeWarning, NonFiniteError, Problem
from mergekit_ext.events import SolverIteration
from mergekit_ext.host import session as sessions
from mergekit_ext.host.session import Session, TensorRecord
from mergekit_ext.kernels.calibration import calibrated, distance, norms_of
from mergekit_ext.kernels.numerics import all_finite, chunks, compute_dtype, count_non_finite
from mergekit_ext.report.card import solver_section

# Beside parameters: the dtype of the output, where a result is calibrated before it is cast.
_FINAL = "dtype of the output"
# Declares no check, no warning and no memory.
PLAIN = Method("", "", None, lambda tensors, call: Merged(tensors[0]))


class ExtMethod(MergeMethod):
    """A merge method that merges one group at a time, and reports on it.

    Subclasses implement `merge_one`; checks, warnings and memory are those of `declared`.
    `problems` and `notes` are asked before any weight is read, `warnings` after the last tensor.
    Results carry no gradient.
    """

    declared: Method = PLAIN

    @abstractmethod
    def merge_one(self, group: TensorGroup, parameters: Values, out_dtype: torch.dtype) -> Merged:
        """Merge one group into a tensor in `out_dtype`, and say what to report about it."""

    def problems(self, options: Values, inputs: Inputs) -> Iterable[Problem]:
        """Return what is wrong with the shared parameters that a tensor gets, together."""
        return self.declared.check(options, inputs)

    @property
    def ignores_base(self) -> bool:
        """Return whether a base model is one more input, as for `linear`."""
        return self.spec.contract.base == BasePolicy.IGNORED

    def input_problems(self, values: Values) -> Iterable[Problem]:
        """Return what is wrong with the parameters of one model, together; `where` names one."""
        return self.declared.check_each(values)

    def notes(self, options: Values, inputs: Inputs) -> Iterable[str]:
        """Return what `mergekit-ext check` reports of a merge that can be done."""
        return map(str, self.declared.forewarn(options, inputs))

    def passes(self, shared: Values) -> int:
        """Return how many times the merge reads each input tensor."""
        return 1

    def copies(self, models: int, square: float) -> float:
        """Return how many copies of a tensor `merge_one` holds; arguments as `memory.working`."""
        return self.declared.copies(models, square)

    def warnings(self, records: Sequence[TensorRecord]) -> Iterable[MergeWarning]:
        """Return what a user should know about a finished merge."""
        return self.declared.after(self.spec.name, {r.name: r.details for r in records})

    def summary(self, records: Sequence[TensorRecord]) -> str:
        """Return Markdown for the model card about a finished merge; empty if there is nothing."""
        return solver_section({r.name: r.details for r in records})

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: api.BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        running = sessions.current()
        session = running or Session()
        results = []
        bound = zip(groups, parameters, input_dtypes, strict=True)
        for index, (group, values, dtype) in enumerate(bound):
            if dtype is None:
                raise ValueError(f"{self.spec.name}: group {index} has no tensors to merge")
            if dtype != promoted_dtype(group):
                group = align_dtype(group, dtype)
            device = group.entries[0].tensor.device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                found = self._calibrated(group, values, out_dtype or dtype)
            name = group.metadata.name or f"group {index}"
            session.record(TensorRecord(name, found.tensor.numel(), found.details))
            results.append(found.tensor)
        if running is None:
            session.warn(self.warnings(session.records))
        return tuple(results)

    def _calibrated(self, group: TensorGroup, parameters: Values, dtype: torch.dtype) -> Merged:
        """Merge one group, as far as norms suggest with a factor `auto`; report its distance."""
        name = factor_in(parameters)
        auto = parameters.get(name) == AUTO
        given = {**parameters, name: 1.0, _FINAL: dtype} if auto else parameters
        found = self.merge_one(group, given, compute_dtype(group.tensors) if auto else dtype)
        models, start = [entry.tensor for entry in group.non_base], found.start
        if start is None and group.base is not None and not self.ignores_base:
            start = group.base.tensor
        if start is None or not models:
            return replace(found, tensor=found.tensor.to(dtype))
        orthogonal = self.declared.orthogonal and start.ndim > 1
        norms, tensor = found.norms or norms_of(models, start), found.tensor
        details, factor = {**found.details}, found.details.get(name, parameters.get(name))
        length = norms_of([tensor], start)[0] if found.length is None else found.length
        if auto:
            tensor, factor = calibrated(tensor, length, models, norms, start, dtype, orthogonal)
            details[name], length = factor, abs(factor) * length
        inputs = {str(e.id): norm for e, norm in zip(group.non_base, norms, strict=True)}
        details |= distance(length, inputs, {name: factor}, orthogonal)
        return replace(found, tensor=tensor, details=details)


def spec_of(parameter: Parameter, scope: ParameterScope | None = None) -> api.ParameterSpec:
    """Return a parameter as mergekit declares it; `scope` is that of a per-model parameter."""
    per_model = scope or ParameterScope.NON_BASE
    return api.ParameterSpec(
        parameter.name,
        parameter.kind,
        per_model if parameter.per_model else ParameterScope.SHARED,
        description=parameter.description,
        **({} if parameter.required else {"default": parameter.default}),
    )


class DeclaredMethod(ExtMethod):
    r"""``W_0 + F(w_1 t_1, ..., w_m t_m)`` of one tensor, F being the declared function.

    Methods that start from stored tensors (`Method.over_base`) get those.
    """

    def __init__(self, method: Method):
        self.declared = method
        policy = BasePolicy.REQUIRED if method.base else BasePolicy.OPTIONAL
        own, contract = method.for_driver(MODELS), api.InputContract(base=policy, min_non_base=1)
        about = method.title, method.paper
        self.spec = api.MergeMethodSpec(method.name, tuple(map(spec_of, own)), contract, *about)

    def merge_one(self, group: TensorGroup, parameters: Values, out_dtype: torch.dtype) -> Merged:
        """Merge one tensor; values that are not finite, or leave the range of the dtype, raise."""
        entries = group.non_base
        if not entries or (self.declared.base and group.base is None):
            return Merged(group.entries[0].tensor.to(out_dtype))
        name, session = group.metadata.name or "", sessions.current()

        def report(iteration: int, objective: float, change: float) -> None:
            if session is not None:
                session.emit(SolverIteration(name, iteration, objective, change))

        kept = session.solution if session else None
        call = Call(
            [parameters["weight"][entry.id] for entry in entries],
            {p.name: parameters[p.name] for p in self.spec.shared_parameters},
            [],
            layout=layout_of(name, entries[0].tensor.ndim),
            on_iteration=report,
            final=parameters.get(_FINAL),
            solution=kept.read(name) if kept else None,
        )
        try:
            merged = self._merged(group, call, out_dtype)
        except ValueError:
            raise_non_finite(group)
            raise
        except (OverflowError, torch.linalg.LinAlgError):
            self._raise_out_of_range(group)
        if not all_finite(merged.tensor):
            self._raise_out_of_range(group)
        if kept and call.solution:
            kept.write(name, call.solution)
        ids = [str(entry.id) for entry in entries]
        details = {
            key: dict(zip(ids, value, strict=False)) if isinstance(value, list) else value
            for key, value in merged.details.items()
        }
        return replace(merged, details=details)

    def _merged(self, group: TensorGroup, call: Call, dtype: torch.dtype) -> Merged:
        base = None if group.base is None else group.base.tensor
        tensors = [entry.tensor for entry in group.non_base]
        if self.declared.over_base is not None:
            return self.declared.over_base(base, tensors, call, dtype)
        assert base is not None
        precise = compute_dtype(group.tensors)
        weights = [1.0] * len(tensors) if self.declared.weighs else call.weights

        def over(base: Tensor, tensors: Sequence[Tensor]) -> Merged:
            start, weighted = base.to(precise), zip(tensors, weights, strict=True)
            deltas = [(tensor.to(precise) - start).mul_(weight) for tensor, weight in weighted]
            if not all(map(all_finite, deltas)):
                self._raise_out_of_range(group)
            found = self.declared.merge(deltas, call)
            return Merged(found.tensor.add_(start), found.details)

        if not self.declared.elementwise:
            found = over(base, tensors)
            return Merged(found.tensor.to(dtype), found.details)
        out = torch.empty(base.shape, dtype=dtype, device=base.device)
        flat_out, flat_base = out.view(-1), base.reshape(-1)
        flat = [tensor.reshape(-1) for tensor in tensors]
        for part in chunks(flat_base):
            flat_out[part] = over(flat_base[part], [source[part] for source in flat]).tensor
        return Merged(out)

    def _raise_out_of_range(self, group: TensorGroup) -> NoReturn:
        raise_non_finite(group)
        raise MergeError(
            f"{group.metadata.name}: {self.spec.name} gives values that are not finite from "
            "finite inputs; expected values within the range of the output's dtype. Check "
            "`weight` and `lambda`, and that these models are fine-tunes of one base."
        )


def raise_non_finite(group: TensorGroup) -> None:
    """Name the input that holds NaN or infinity; return if none does."""
    name = group.metadata.name or "a tensor"
    for entry in group.entries:
        if count := count_non_finite(entry.tensor):
            raise NonFiniteError(name, str(entry.id), count, entry.tensor.numel())


def group_of(name: str, tensors: Mapping[Any, Tensor], base: Any = None) -> TensorGroup:
    """Return tensors by their models as mergekit's methods take them; `base` is one of these."""
    entries = (api.TensorEntry(model, tensor, model == base) for model, tensor in tensors.items())
    return TensorGroup(tuple(entries), api.TensorMetadata(name))


def registered() -> dict[str, MergeMethod]:
    """Return all methods that mergekit knows, by name."""
    return {method.spec.name: method for method in merge_methods.registered_methods()}


def is_stock(name: str) -> bool:
    """Return whether mergekit itself, or another plug-in, has registered a method called `name`."""
    return name in registered() and ext_method(name) is None


def ext_method(name: str) -> ExtMethod | None:
    """Return the project's method called `name`; None for mergekit's own and for unknown names."""
    method = registered().get(name)
    return method if isinstance(method, ExtMethod) else None
