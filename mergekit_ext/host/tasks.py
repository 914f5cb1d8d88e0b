"""Graph tasks: one tensor merged, one tensor measured, and the statistics graph of the latter.

NAN with granularity ``block`` or ``model`` needs norms of whole groups of tensors before one is
merged. A first graph measures them; the second, which has no edges between tensors, is given them.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mergekit import merge_methods
from mergekit.common import ImmutableMap, ModelReference, dtype_from_name
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.merge_methods.base import BasePolicy
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.multigpu_executor import MultiGPUExecutor

from mergekit_ext import parallel
from mergekit_ext.declared.method import factor_in
from mergekit_ext.declared.nan import combine_norms, inverse_norm_coefficients
from mergekit_ext.errors import MergeError, NonFiniteError, printable
from mergekit_ext.events import StatisticsBegin, StatisticsEnd, TensorMeasured, TensorMerged
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ext_method, group_of
from mergekit_ext.host.nan_method import ALONE, GRANULARITIES, NORMS, NanMethod
from mergekit_ext.host.session import Session, TensorRecord
from mergekit_ext.io.headers import is_counter
from mergekit_ext.io.journal import Finished
from mergekit_ext.kernels.calibration import distance, norms_of
from mergekit_ext.kernels.numerics import count_non_finite
from mergekit_ext.kernels.seeds import derived, seeded


class MergeTensorTask(ExecuteMergeMethodTask):
    """mergekit's task, with an event when a tensor is done.

    Random numbers depend on `seed` and the tensor's name alone, not on what was merged before.
    Counters of training are those of the base, or else of the first model. With `copies` the one
    input is the output.
    """

    seed: int = 0
    copies: bool = False

    @classmethod
    def of(cls, task: ExecuteMergeMethodTask, seed: int | None, **given: Any) -> "MergeTensorTask":
        """Return mergekit's task as one of ours, with values that are `given` for its fields."""
        fields = {name: getattr(task, name) for name in type(task).model_fields}
        return cls.model_construct(**{**fields, "seed": seed or 0, **given})

    @classmethod
    def copying(cls, task: ExecuteMergeMethodTask, model: ModelReference) -> "MergeTensorTask":
        """Return a task that gives the tensor of one `model` where `task` merges."""
        gather = task.gather_tensors
        inner = getattr(gather, "gather_tensors", gather)  # of vocabularies that are aligned
        own = ImmutableMap({model: inner.weight_info[model]})
        only = inner.model_copy(update={"weight_info": own})
        if inner is not gather:
            only = gather.model_copy(update={"gather_tensors": only})
        return cls.of(task, None, gather_tensors=only, model_order=(model,), copies=True)

    def execute(self, tensors: dict[ModelReference, torch.Tensor], **_: Any) -> torch.Tensor | None:
        """Merge as mergekit does; `MergeError` if tensors without a mean differ."""
        started, name = time.perf_counter(), self.output_weight.name
        merged = self._copied(tensors) if self.copies else self._merged(tensors)
        if (session := sessions.current()) is None:
            return merged
        if merged is not None and (self.copies or ext_method(self.method_name) is None):
            session.record(TensorRecord(name, merged.numel(), self._reported(tensors, merged)))
        details = session.recorded[name].details if name in session.recorded else {}
        shape = () if merged is None else tuple(merged.shape)
        session.emit(TensorMerged(name, shape, details, time.perf_counter() - started))
        return merged

    def _merged(self, tensors: dict[ModelReference, torch.Tensor]) -> torch.Tensor | None:
        name = self.output_weight.name
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        if is_counter(name) and tensors:
            order = (self.base_model, *self.model_order)
            tensors = dict.fromkeys(tensors, next(tensors[m] for m in order if m in tensors))
        with seeded(derived(self.seed, name), device):
            try:
                merged: torch.Tensor | None = super().execute(tensors)
            except ValueError as error:
                if all(tensor.is_floating_point() for tensor in tensors.values()):
                    raise
                remedy = "Save the models with the same values, which are copied."
                raise MergeError(f"{printable(str(error))}. {remedy}") from None
        return merged

    def _copied(self, tensors: Mapping[ModelReference, torch.Tensor]) -> torch.Tensor | None:
        for model, tensor in tensors.items():  # one, or none of an optional tensor
            if count := count_non_finite(tensor):
                raise NonFiniteError(self.output_weight.name, str(model), count, tensor.numel())
            dtype = dtype_from_name(self.out_dtype)
            return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        return None

    def _reported(
        self, tensors: Mapping[ModelReference, torch.Tensor], merged: torch.Tensor
    ) -> Mapping[str, Any]:
        """Return whose copy it is, or how far mergekit's method went from a base."""
        if self.copies:
            return {"copied_from": ", ".join(map(str, tensors))}
        base, order = tensors.get(self.base_model), self.model_order
        if merge_methods.get(self.method_name).spec.contract.base == BasePolicy.IGNORED:
            base = None
        inputs = {str(m): tensors[m] for m in order if m != self.base_model and m in tensors}
        if base is None or any(t.shape != merged.shape for t in (base, *inputs.values())):
            return {}
        length, *norms = norms_of([merged, *inputs.values()], base)
        factor = {name: self.parameters[name] for name in (factor_in(self.parameters),) if name}
        return distance(length, dict(zip(inputs, norms, strict=True)), factor)


class MeasureTensorTask(Task[dict[str, float]]):
    """The norms of the inputs of one `MergeTensorTask`, by the names of the models.

    Plain numbers, which the executor moves nowhere; and no task joins tensors, so that several GPUs
    can share a statistics graph.
    """

    merge: Any

    def arguments(self) -> dict[str, Task]:
        return {"tensors": self.merge.gather_tensors}

    def group_label(self) -> str | None:
        return self.merge.gather_tensors.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, tensors: dict[ModelReference, torch.Tensor]) -> dict[str, float]:
        name, base = self.merge.output_weight.name, self.merge.base_model
        method = ext_method(self.merge.method_name)
        assert isinstance(method, NanMethod)
        present = {m: tensors[m] for m in self.merge.model_order if tensors.get(m) is not None}
        group = group_of(name, present, base)
        measured: Mapping[Any, float] = {}
        # Without the base's tensor there is no task vector: the merge passes such a tensor on.
        based = base is None or group.base is not None or method.ignores_base
        if based and all(tensor.is_floating_point() for tensor in group.tensors):
            group.validate_tensors()
            measured = method.norms(group, dict(self.merge.parameters.items()))
        session = sessions.current()
        if session is not None:
            session.emit(TensorMeasured(name))
        return {str(model): norm for model, norm in measured.items()}


class _Group(NamedTuple):
    """What tensors have in common that share coefficients; slices may take different models."""

    granularity: str
    name: str
    models: tuple[ModelReference, ...]
    base: ModelReference | None
    norm_of: str | None


_Norms = dict[_Group, dict[ModelReference, float]]


def with_statistics(tasks: Iterable[MergeTensorTask], options: Any) -> list[MergeTensorTask]:
    """Run the statistics graph that `tasks` need, if any; return the tasks with its results."""
    grouped = [(_group_of(task), task) for task in tasks]
    pending = [(group, task) for group, task in grouped if group is not None]
    norms = _measured(pending, options) if pending else {}
    found = []
    for group, task in grouped:
        if group is not None:
            parameters = {**dict(task.parameters.items()), NORMS: norms.get(group, {})}
            task = task.model_copy(update={"parameters": ImmutableMap(parameters)})
        found.append(task)
    return found


def _group_of(task: MergeTensorTask) -> _Group | None:
    """Return the group of a task's tensor; None if it needs no other tensor's norms."""
    if task.copies or not isinstance(ext_method(task.method_name), NanMethod):
        return None
    granularity = task.parameters["granularity"]
    if granularity in ALONE:
        return None
    name = GRANULARITIES[granularity](task.output_weight.name)
    models = tuple(sorted(task.model_order, key=str))
    return _Group(granularity, name, models, task.base_model, task.parameters["norm_of"])


def _measured(tasks: Sequence[tuple[_Group, MergeTensorTask]], options: Any) -> _Norms:
    """Return the norms of all groups, from the journal or measured by all processes."""
    session, processes = sessions.current() or Session(), parallel.current()
    started = time.perf_counter()
    # A tied tensor counts once in each group.
    unique = {(group, _stored(task)): (group, task) for group, task in reversed(tasks)}
    groups = {task.output_weight.name: group for group, task in reversed(unique.values())}
    models = {str(model): model for _, task in tasks for model in task.model_order}
    finished = Finished(session.journal)
    found = finished.found("statistics", "norms")
    session.emit(StatisticsBegin(0 if found else len(groups)))
    if not found:
        merges = {task.output_weight.name: task for _, task in unique.values()}
        own = processes.own(groups, session.work_of)
        targets = {MeasureTensorTask(merge=merges[name]): name for name in own}
        measured = {targets[target]: norms for target, norms in _run(list(targets), options)}
        found = processes.gather_items(measured)
        finished.add("statistics", "norms", found)
    totals = combine_norms(
        (group, {models[model]: norm for model, norm in found[name].items()})
        for name, group in groups.items()
    )
    session.emit(StatisticsEnd(_coefficients(totals), time.perf_counter() - started))
    return totals


def _run(targets: Sequence[Task], options: Any) -> Iterator[tuple[Task, Any]]:
    """Run tasks as ``run_merge`` would, without its progress bar; yield each with its value, once.

    mergekit's multi-GPU executor may end before it has handed out what its threads put into the
    queue: what is missing is run again.
    """
    missing = dict.fromkeys(targets)
    if missing and options.multi_gpu:
        storage = None if options.low_cpu_memory else "cpu"
        for target, value in MultiGPUExecutor(targets, storage_device=storage).run(quiet=True):
            del missing[target]
            yield target, value
    if missing:
        storage = options.device if options.low_cpu_memory else "cpu"
        executor = Executor(list(missing), math_device=options.device, storage_device=storage)
        yield from executor.run(quiet=True)


def _stored(task: MergeTensorTask) -> tuple[tuple[str, str], ...]:
    """Return models and names of the stored tensors that a task reads."""
    # mergekit plans a tied head as a tensor of its own, although it is the embedding that is read.
    loads = []
    pending: list[Any] = [task.gather_tensors]
    while pending:
        part = pending.pop()
        pending += part.arguments().values()
        if isinstance(part, LoadTensor):
            name = part._resolve_name(LoaderCache().get(part.model))
            loads.append((str(part.model), name or part.tensor))
    return tuple(sorted(loads))


def _coefficients(norms: _Norms) -> dict[str, dict[str, float]]:
    names = Counter(group.name for group in norms)
    found = {}
    for group, models in norms.items():
        base = f" over {group.base}" if group.base else ""
        listed = ", ".join(str(model) for model in group.models if model != group.base)
        label = group.name if names[group.name] == 1 else f"{group.name} of {listed}{base}"
        values = inverse_norm_coefficients(list(models.values()))
        found[label] = dict(zip(map(str, models), values, strict=True))
    return found
