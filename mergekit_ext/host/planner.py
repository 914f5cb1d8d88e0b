"""mergekit's planner, with the statistics graph before the merge graph, and planned files."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor

from mergekit_ext import parallel
from mergekit_ext.events import MergeBegin
from mergekit_ext.host import session as sessions
from mergekit_ext.host.method import ExtMethod, ext_method
from mergekit_ext.host.session import Session
from mergekit_ext.host.tasks import MergeTensorTask, with_statistics
from mergekit_ext.host.writer import PlannedWriter, PlannedWriterTask
from mergekit_ext.methods import Inputs


def extended(stock: type) -> type:
    """A subclass of mergekit's ``MergePlanner`` that measures before it hands out a plan.

    In a session with a journal the plan leaves out what is finished, and what other processes do.

    The class is made from `stock` because ``mergekit.plan`` is still being imported when this is
    needed. Plans for mergekit's own methods are left as they are outside of a session.
    """

    class MergePlanner(stock):
        _tensors: list[Any]

        def _plan(self) -> None:
            super()._plan()
            self._prepare(sessions.current(), ())

        def plan_tensor(
            self, weight: Any, weights_in: list[Any], models: list[Any], cfg_reader: Any
        ) -> None:
            """Plan an optional tensor that has aliases, which stops mergekit's planner.

            mergekit looks for one in the files by adding its list of a name to the tuple of
            aliases. Here is that look; mergekit plans the tensor as one that is there.
            """
            if not (weight.optional and any(w.aliases for w in weights_in)):
                super().plan_tensor(weight, weights_in, models, cfg_reader)
            elif any(map(_is_stored, models, weights_in)):
                there = weight.model_copy(update={"optional": False})
                super().plan_tensor(there, weights_in, models, cfg_reader)
                _, task = self._tensors.pop()
                task = task.model_copy(update={"output_weight": weight})
                self._tensors.append((weight, task))

        def plan_to_disk(self, out_path: str) -> list[Any]:
            """mergekit's tasks, with a writer whose finished tensors are not merged again."""
            session, processes = sessions.current(), parallel.current()
            if session is None or session.journal is None or session.staging is None:
                return super().plan_to_disk(out_path)
            super()._plan()
            # Of two tensors of one name the last counts, as in mergekit.
            self._tensors = list({item[0].name: item for item in self._tensors}.values())
            session.order = [weight.name for weight, _ in self._tensors]
            entries = {name: session.predicted.get(name) for name in session.order}
            limit = self.options.out_shard_size
            # All processes write where the main one does, whatever `out_path` is in them.
            writer = PlannedWriter(session.staging.output, session, entries, limit)
            if writer.finished:
                done, count = len(writer.finished), len(entries)
                session.say(f"Going on with a merge that was stopped: {done} of {count} tensors.")
            self._prepare(session, writer.finished)
            left = [item for item in self._tensors if item[0].name not in writer.finished]
            owners = processes.share([session.size_of(weight.name) for weight, _ in left])
            task = PlannedWriterTask(out_path=out_path, max_shard_size=limit, writer=writer)
            saves = [
                SaveTensor(
                    tensor_name=weight.name,
                    tensor_task=merged,
                    writer_task=task,
                    clone=False,
                    optional=weight.optional,
                    dtype=weight.force_dtype or self.config.out_dtype,
                )
                for (weight, merged), owner in zip(left, owners, strict=True)
                if owner == processes.rank
            ]
            last = FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=task)
            rest = [self._tokenizer_task] if self._tokenizer_task else []
            return [*saves, last, *rest]

        def _prepare(self, session: Session | None, finished: Collection[str]) -> None:
            """Make the tasks ours, with what the statistics graph measures."""
            name = self._method.spec.name
            method = ext_method(name)
            if method is None and session is None:
                return
            if method is not None:
                _forewarn(method, (task for _, task in self._tensors), session or Session())
            if session is not None:
                models = tuple(map(str, self.config.referenced_models()))
                left = len(self._tensors) - len(finished)
                session.emit(MergeBegin(name, session.output, models, left))
            weights = [weight for weight, _ in self._tensors]
            # Cast once: a half-precision result would be rounded before a wider out_dtype.
            tasks = [
                MergeTensorTask.of(
                    task,
                    self.options.random_seed,
                    out_dtype=weight.force_dtype or self.config.out_dtype,
                )
                for weight, task in self._tensors
            ]
            self._tensors = list(zip(weights, with_statistics(tasks, self.options), strict=True))

    return MergePlanner


def _is_stored(model: Any, weight: Any) -> bool:
    stored = LoaderCache().get(model).index.tensor_paths
    return any(name in stored for name in (weight.name, *(weight.aliases or ())))


def _forewarn(method: ExtMethod, tasks: Iterable[Any], session: Session) -> None:
    for task in tasks:
        # Norm and head of a merge of slices have the parameters of one slice's models only.
        weights = [
            task.input_parameters[model]["weight"]
            for model in task.model_order
            if model != task.base_model and model in task.input_parameters
        ]
        inputs = Inputs(len(weights), task.base_model is not None, weights=weights)
        session.warn(method.forewarnings(dict(task.parameters.items()), inputs))
