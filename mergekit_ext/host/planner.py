"""mergekit's planner, with the statistics graph before the merge graph."""

from __future__ import annotations

from typing import Any

from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner as StockPlanner

from mergekit_ext.events import MergeBegin
from mergekit_ext.host import session as sessions
from mergekit_ext.host.methods import ext_method
from mergekit_ext.host.statistics import with_statistics
from mergekit_ext.host.tasks import MergeTensorTask


class MergePlanner(StockPlanner):
    """Plans as mergekit does; measures what the project's methods need before they start.

    Plans for mergekit's own methods are left as they are.
    """

    _tensors: list[Any]

    def _plan(self) -> None:
        super()._plan()
        session = sessions.current()
        if ext_method(self._method.spec.name) is None and session is None:
            return
        self._forewarn(session or sessions.Session())
        weights = [weight for weight, _ in self._tensors]
        tasks = [self._reporting(weight, task) for weight, task in self._tensors]
        if session is not None:
            models = tuple(map(str, self.config.referenced_models()))
            session.emit(
                MergeBegin(self._method.spec.name, session.output, models, len(self._tensors))
            )
        self._tensors = list(zip(weights, with_statistics(tasks, self.options), strict=True))

    def _forewarn(self, session: sessions.Session) -> None:
        method = ext_method(self._method.spec.name)
        if method is None:
            return
        for _, task in self._tensors:
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

    def _reporting(self, weight: Any, task: ExecuteMergeMethodTask) -> MergeTensorTask:
        fields = {name: getattr(task, name) for name in type(task).model_fields}
        # Cast once: without this a half-precision result would be rounded before a wider
        # out_dtype is applied.
        fields["out_dtype"] = weight.force_dtype or self.config.out_dtype
        return MergeTensorTask.model_construct(**fields)
