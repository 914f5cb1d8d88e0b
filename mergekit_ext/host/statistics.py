"""The first of two graphs: norms of whole blocks and models, before a tensor is merged.

The targets of this graph are small plain values. They become parameters of the tasks of the
second graph, which has no edges between tensors and so stays as parallel as mergekit made it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from mergekit.common import ImmutableMap, ModelReference

from mergekit_ext import parallel
from mergekit_ext.events import StatisticsBegin, StatisticsEnd
from mergekit_ext.host import compat
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ext_method
from mergekit_ext.host.nan_method import GRANULARITIES, NORMS, NanMethod
from mergekit_ext.host.session import Session
from mergekit_ext.host.tasks import MeasureTensorTask, MergeTensorTask
from mergekit_ext.kernels.nan import combine_norms, inverse_norm_coefficients

# The kind of line in the journal.
_LINE = "norms"
Norms = dict[Hashable, dict[Hashable, float]]


@dataclass(frozen=True)
class GroupKey:
    """Tensors with the same key share coefficients.

    Slices may take different models, or measure against different bases: what is measured over
    other tensors or otherwise cannot be compared.
    """

    granularity: str
    group: str
    models: tuple[ModelReference, ...]
    base: ModelReference | None
    norm_of: str | None

    @classmethod
    def of(cls, task: MergeTensorTask) -> GroupKey:
        granularity = task.parameters["granularity"]
        group = GRANULARITIES[granularity](task.output_weight.name)
        models = tuple(sorted(task.model_order, key=str))
        return cls(granularity, group, models, task.base_model, task.parameters["norm_of"])


def with_statistics(tasks: Sequence[MergeTensorTask], options: Any) -> list[MergeTensorTask]:
    """Run the statistics graph that `tasks` need, if any; return the tasks with its results."""
    pending = [task for task in tasks if _needs_norms(task)]
    if not pending:
        return list(tasks)
    norms = _measure(pending, options)
    return [
        _with_norms(task, norms.get(GroupKey.of(task), {})) if _needs_norms(task) else task
        for task in tasks
    ]


def _needs_norms(task: MergeTensorTask) -> bool:
    return (
        isinstance(ext_method(task.method_name), NanMethod)
        and task.parameters["granularity"] != "tensor"
    )


def _measure(tasks: Sequence[MergeTensorTask], options: Any) -> Norms:
    started = time.perf_counter()
    # A tied tensor counts once in each group.
    unique = {(GroupKey.of(task), compat.source_key(task)): task for task in reversed(tasks)}
    measuring = {
        MeasureTensorTask(
            method_name=task.method_name,
            gather_tensors=task.gather_tensors,
            model_order=task.model_order,
            base_model=task.base_model,
            tensor=task.output_weight.name,
            parameters=task.parameters,
        ): GroupKey.of(task)
        for task in reversed(unique.values())
    }
    session = sessions.current() or Session()
    by_name = {str(model): model for task in tasks for model in task.model_order}
    measured = _norms_of(list(measuring), session, options)
    totals = combine_norms(
        (key, {by_name[name]: norm for name, norm in measured[target.tensor].items()})
        for target, key in measuring.items()
    )
    session.emit(StatisticsEnd(_coefficients(totals), time.perf_counter() - started))
    return totals


def _norms_of(
    targets: Sequence[MeasureTensorTask], session: Session, options: Any
) -> dict[str, dict[str, float]]:
    """The norms of each tensor: from the journal, or measured by this process or by another."""
    together, journal = parallel.current(), session.journal
    finished = {} if journal is None else journal.finished
    found = {
        target.tensor: norms
        for target in targets
        if _are_norms(norms := finished.get((_LINE, target.tensor)), target.model_order)
    }
    missing = [target for target in targets if target.tensor not in found]
    session.emit(StatisticsBegin(len(missing)))
    owners = together.share([session.size_of(target.tensor) for target in missing])
    mine = [t for t, owner in zip(missing, owners, strict=True) if owner == together.rank]
    measured = {}
    for target, norms in compat.run_tasks(mine, options):
        measured[target.tensor] = norms
        if journal is not None:
            journal.add(_LINE, target.tensor, norms)
    for part in together.gather(measured):
        found |= part
    return found


def _are_norms(value: Any, models: Sequence[ModelReference]) -> TypeGuard[dict[str, float]]:
    """Whether `MeasureTensorTask` may have found it: a disk may hold anything after a power cut."""
    return (
        isinstance(value, dict)
        and value.keys() <= set(map(str, models))
        and all(type(norm) is float and 0 <= norm < math.inf for norm in value.values())
    )


def _coefficients(norms: Norms) -> dict[str, dict[str, float]]:
    names = Counter(key.group for key in norms if isinstance(key, GroupKey))
    found = {}
    for key, models in norms.items():
        if isinstance(key, GroupKey):
            label = key.group if names[key.group] == 1 else f"{key.group} of {_listed(key)}"
            values = inverse_norm_coefficients(list(models.values()))
            found[label] = dict(zip(map(str, models), values, strict=True))
    return found


def _listed(key: GroupKey) -> str:
    base = f" over {key.base}" if key.base else ""
    return ", ".join(str(model) for model in key.models if model != key.base) + base


def _with_norms(task: MergeTensorTask, norms: Mapping[ModelReference, float]) -> MergeTensorTask:
    parameters = {**dict(task.parameters.items()), NORMS: dict(norms)}
    return task.model_copy(update={"parameters": ImmutableMap(parameters)})
