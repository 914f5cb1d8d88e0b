"""mergekit's planner, with the statistics graph before the merge graph."""

from __future__ import annotations

from typing import Any

from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_ext.events import MergeBegin
from mergekit_ext.host import session as sessions
from mergekit_ext.host.methods import ext_method
from mergekit_ext.host.statistics import with_statistics
from mergekit_ext.host.tasks import MergeTensorTask


def extended(stock: type) -> type:
    """A subclass of mergekit's ``MergePlanner`` that measures before it hands out a plan.

    The class is made from `stock` because ``mergekit.plan`` is still being imported when this is
    needed. Plans for mergekit's own methods are left as they are, unless somebody listens.
    """

    class MergePlanner(stock):
        _tensors: list[Any]

        def _plan(self) -> None:
            super()._plan()
            session = sessions.current()
            method = self._method.spec.name
            if ext_method(method) is None and session is None:
                return
            _forewarn(method, [task for _, task in self._tensors], session)
            if session is not None:
                models = tuple(map(str, self.config.referenced_models()))
                session.emit(MergeBegin(method, session.output, models, len(self._tensors)))
            tasks = [
                _reporting(task, weight.force_dtype or self.config.out_dtype)
                for weight, task in self._tensors
            ]
            planned = with_statistics(tasks, self.options)
            weights = [weight for weight, _ in self._tensors]
            self._tensors = list(zip(weights, planned, strict=True))

    return MergePlanner


def _forewarn(
    name: str, tasks: list[ExecuteMergeMethodTask], session: sessions.Session | None
) -> None:
    method = ext_method(name)
    if method is None:
        return
    session = session or sessions.Session()
    for task in tasks:
        # Norm and head of a merge of slices have the parameters of one slice's models only.
        models = [
            model
            for model in task.model_order
            if model != task.base_model and model in task.input_parameters
        ]
        session.warn(
            method.forewarnings(
                dict(task.parameters.items()),
                has_base=task.base_model is not None,
                inputs=[str(model) for model in models],
                where="parameters",
                weights=[task.input_parameters[model]["weight"] for model in models],
            )
        )


def _reporting(task: ExecuteMergeMethodTask, out_dtype: str | None) -> MergeTensorTask:
    fields = {name: getattr(task, name) for name in type(task).model_fields}
    # Cast once: without this a half-precision result would be rounded before a wider out_dtype.
    return MergeTensorTask.model_construct(**{**fields, "out_dtype": out_dtype})
