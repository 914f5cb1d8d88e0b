"""The first of two graphs: norms of whole blocks and models, before a tensor is merged.

The targets of this graph are small plain values. They become parameters of the tasks of the
second graph, which has no edges between tensors and so stays as parallel as mergekit made it.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mergekit.common import ImmutableMap, ModelReference

from mergekit_ext.events import StatisticsBegin, StatisticsEnd
from mergekit_ext.host import compat
from mergekit_ext.host import session as sessions
from mergekit_ext.host.methods import ext_method
from mergekit_ext.host.nan_method import NORMS, NanMethod, combine_norms, group_key
from mergekit_ext.host.tasks import MeasureTensorTask, MergeTensorTask
from mergekit_ext.kernels.nan import inverse_norm_coefficients

Norms = dict[tuple[str, str], dict[Hashable, float]]


def with_statistics(tasks: Sequence[MergeTensorTask], options: Any) -> list[MergeTensorTask]:
    """Run the statistics graph that `tasks` need, if any; return the tasks with its results."""
    pending = [task for task in tasks if _needs_norms(task)]
    if not pending:
        return list(tasks)
    norms = _measure(pending, options)
    return [_with_norms(task, norms[_key(task)]) if _needs_norms(task) else task for task in tasks]


def _needs_norms(task: MergeTensorTask) -> bool:
    return (
        isinstance(ext_method(task.method_name), NanMethod)
        and task.parameters["granularity"] != "tensor"
    )


def _key(task: MergeTensorTask) -> tuple[str, str]:
    return group_key(task.parameters["granularity"], task.output_weight.name)


def _measure(tasks: Sequence[MergeTensorTask], options: Any) -> Norms:
    started = time.perf_counter()
    # A tied tensor counts once in each group.
    unique = {(_key(task), compat.source_key(task)): task for task in reversed(tasks)}
    measuring = {
        MeasureTensorTask(
            method_name=task.method_name,
            gather_tensors=task.gather_tensors,
            model_order=task.model_order,
            base_model=task.base_model,
            tensor=task.output_weight.name,
            parameters=task.parameters,
        ): task
        for task in reversed(unique.values())
    }
    session = sessions.current()
    if session is not None:
        session.emit(StatisticsBegin(len(measuring)))
    by_name = {str(model): model for task in tasks for model in task.model_order}
    measured = []
    for target, values in compat.run_tasks(list(measuring), options):
        granularity = measuring[target].parameters["granularity"]
        norms = {by_name[name]: norm for name, norm in values.items()}
        measured.append((granularity, target.tensor, norms))
    totals = combine_norms(measured)
    for task in tasks:
        totals.setdefault(_key(task), {})
    if session is not None:
        session.emit(StatisticsEnd(_coefficients(totals), time.perf_counter() - started))
    return totals


def _coefficients(norms: Norms) -> dict[str, dict[str, float]]:
    return {
        group: dict(
            zip(map(str, models), inverse_norm_coefficients(list(models.values())), strict=True)
        )
        for (_, group), models in norms.items()
    }


def _with_norms(task: MergeTensorTask, norms: Mapping[ModelReference, float]) -> MergeTensorTask:
    parameters = {**dict(task.parameters.items()), NORMS: dict(norms)}
    return task.model_copy(update={"parameters": ImmutableMap(parameters)})
