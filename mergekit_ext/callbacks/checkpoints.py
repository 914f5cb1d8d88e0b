"""Merging the checkpoints of one run, or the states of one adapter, while it is trained."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_ext.callbacks import processes
from mergekit_ext.callbacks.base import Base
from mergekit_ext.callbacks.collected import collected
from mergekit_ext.callbacks.evaluate import Evaluate
from mergekit_ext.callbacks.kinds import Kind, kind_of_model, kind_of_weights, seen
from mergekit_ext.callbacks.log import LogTo, require_log
from mergekit_ext.callbacks.merged import Merged
from mergekit_ext.callbacks.protocol import Callback
from mergekit_ext.callbacks.settings import MEMORY, SUBJECT, Settings
from mergekit_ext.callbacks.weights import Weights, read, require_finite
from mergekit_ext.errors import ConfigError, MergeWarning, Problem


class MergeCheckpoints(Callback):
    """Collects snapshots of the model that is trained, and merges them.

    Snapshots are whole models, or the adapter alone when the model is a PeftModel; adapters are
    merged as changes, by the methods of `peft_merge.merge_adapters`. Merges run when training ends
    and whenever `merge` is called; the last result is in `result`. In a run of several processes
    the main one keeps and merges, and merged weights that are loaded reach all.

    Args:
        method: any registered merge method; `average`, the uniform mean of all snapshots, or
            `ema`, their exponential moving mean (parameters `decay`, 0.999, and
            `bias_correction`, true). These two keep one float32 mean and no snapshots.
        keep: how many snapshots are kept; the oldest go first.
        every: a snapshot in each step that is a multiple of it (with `on="save"`: in each save).
        start: no snapshots before this step.
        on: "step", of the live model; or "save": saved checkpoints are merged from where they are.
            They are read when they are merged, and must still be there.
        where: "memory" (of the CPU), or a folder for this run's snapshots, read tensor by tensor.
        base: the base model of methods that have one: "initial" (the weights at `on_train_begin`),
            a folder, a module or tensors by name. None: initial if the method needs a base.
        parameters: of the method. A per-model one is a value for all snapshots, or one for each;
            a `weight` that a method asks for is 1.
        adapter: which adapter of a PeftModel; by default the active one.
        adapter_options: `rank`, `space`, `modules_to_save`, `dtype` of
            `peft_merge.merge_adapters`.
        seed: of random methods; training's own random numbers are not touched.
        device: where is merged.
        evaluate: a function ``(model, task) -> {metric: value}`` that scores the merged weights
            and the model's own, in the model itself.
        task: what `evaluate` is called with.
        metric: by which `keep_better` decides; by default the first.
        greater_is_better: whether a higher value of it is.
        load: put the merged weights into the model when training ends. A merged adapter becomes a
            further one, `merged`, and the active one.
        keep_better: only if they score better than the model's own.
        callbacks: told of the merges' events.
        log: an object with a method ``log(values, step)`` for the scores.

    Raises:
        ConfigError: the arguments are wrong, all at once. What depends on the model is checked
            when it is first seen, at `on_train_begin` or in the first step.
        TypeError: `evaluate` cannot be called, or `log` cannot log.
    """

    def __init__(
        self,
        method: str = "average",
        *,
        keep: int = 5,
        every: int = 1,
        start: int = 0,
        on: str = "step",
        where: str | os.PathLike[str] = MEMORY,
        base: Any = None,
        parameters: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        adapter_options: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: Any = "cpu",
        evaluate: Any = None,
        task: str = "model",
        metric: str | None = None,
        greater_is_better: bool = True,
        load: bool = False,
        keep_better: bool = False,
        callbacks: Iterable[object] = (),
        log: Any = None,
    ):
        if log is not None:
            require_log(log)
        self._log, self._task = log, task
        if evaluate is not None and not isinstance(evaluate, Evaluate):
            evaluate = Evaluate(evaluate)
        self._evaluate: Evaluate | None = evaluate
        self._settings = Settings(
            method=method,
            keep=keep,
            every=every,
            start=start,
            on=on,
            where=where,
            base=base,
            parameters={} if parameters is None else parameters,
            adapter=adapter,
            adapter_options=dict(adapter_options or {}),
            seed=seed,
            device=device,
            metric=metric,
            greater_is_better=greater_is_better,
            load=load,
            keep_better=keep_better,
            evaluated=evaluate is not None,
            callbacks=tuple(callbacks),
        )
        self._collected = collected(self._settings)
        self._kind: Kind | None = None
        self._base = Base(self._settings)
        self._saves = self._step = 0
        self.result: Merged | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the snapshots that a merge would take; for `average` and `ema` of all so far."""
        return self._collected.steps

    def on_train_begin(self, step: int, model: Any) -> None:
        """Check what depends on the model, and keep the initial weights if they are needed."""
        self._step = step
        if processes.is_main() and self._kind is None:
            kind = kind_of_model(model, self._settings)
            self._prepare(kind, seen(kind, model, step), beginning=step == 0)

    def on_step_end(self, step: int, model: Any) -> None:
        """Take a snapshot if one is due.

        Raises:
            NonFiniteError: the model holds NaN or infinity; names the tensor and the step.
            ConfigError: see the class.
        """
        self._step = step
        if not processes.is_main() or self._settings.on != "step":
            return
        if self._kind is None:
            kind = kind_of_model(model, self._settings)
            self._prepare(kind, seen(kind, model, step))
        if self._settings.wants(step):
            self._take(step, seen(self._the_kind(), model, step))

    def on_save(self, step: int, path: str | os.PathLike[str]) -> None:
        """Take the saved checkpoint as a snapshot, if they are what is merged."""
        if not processes.is_main() or self._settings.on != "save":
            return
        self._saves += 1
        if step < self._settings.start or self._saves % self._settings.every:
            return
        weights = read(Path(path).resolve())
        if self._kind is None:
            self._prepare(kind_of_weights(weights, self._settings), weights)
        self._take(step, weights)

    def on_train_end(self, step: int, model: Any) -> None:
        """Merge, evaluate, and load if asked; without snapshots a warning."""
        self._step = step
        empty = processes.agree(not self.steps)
        if not empty:
            self.merge(model=model)
        elif processes.is_main():
            warnings.warn(
                MergeWarning(
                    f"{self._settings.method}: no snapshot was taken in {step} steps, so nothing "
                    "was merged. Lower `every` or `start`."
                ),
                stacklevel=2,
            )

    def merge(self, step: int | None = None, model: Any = None) -> Merged | None:
        """Merge the snapshots that are kept.

        Args:
            step: leave out those of later steps.
            model: evaluate in this model, and load into it, as the arguments of the class say. In
                a run of several processes all must make this call; without a model any may.

        Returns:
            What was merged; None in processes that are not the main one.

        Raises:
            ConfigError: there are no snapshots, or too few for the method.
            MergeError: in other processes, if the main one failed.
        """
        if model is None:
            return self._merge(step) if processes.is_main() else None
        return self._merge_into(step, model)

    def _merge(self, step: int | None) -> Merged:
        if self._kind is None:
            raise ConfigError(
                [Problem("snapshots", "none", "one at least", "Train first.")], SUBJECT
            )
        for callback in self._settings.callbacks:
            if isinstance(callback, LogTo):
                callback.at(self._step)
        steps, weights, report = self._collected.merge(self._kind, self._base.weights, step)
        self.result = Merged(steps[-1], steps, self._settings.method, weights, report)
        return self.result

    def _merge_into(self, step: int | None, model: Any) -> Merged | None:
        merged, error = None, None
        if processes.is_main():
            try:
                merged = self._scored(self._merge(step), model)
            except Exception as raised:
                error = raised
        wanted = processes.agree(merged is not None and self._better(merged), error)
        if error is not None:
            raise error
        if wanted:
            self._kind = self._kind or kind_of_model(model, self._settings)
            self._kind.share(model, None if merged is None else merged.weights)
            merged = None if merged is None else dataclasses.replace(merged, loaded=True)
        self.result = merged
        return merged

    def _scored(self, merged: Merged, model: Any) -> Merged:
        if self._evaluate is None:
            return merged
        inner = processes.unwrapped(model)
        before = self._evaluate(inner, self._task)
        metric = self._settings.metric
        if metric is not None and metric not in before:
            expected = f"one of {', '.join(before)}, which `evaluate` returns"
            raise ConfigError([Problem("metric", repr(metric), expected)], SUBJECT)
        with self._the_kind().applied(model, merged.weights):
            scores = self._evaluate(inner, self._task)
        if self._log is not None:
            values = {f"merged/{name}": value for name, value in scores.items()}
            self._log.log(values | {f"last/{k}": v for k, v in before.items()}, self._step)
        return dataclasses.replace(merged, scores=scores, before=before)

    def _better(self, merged: Merged) -> bool:
        """Whether the merged weights are to be loaded."""
        if not self._settings.load or not self._settings.keep_better:
            return self._settings.load
        if merged.scores is None or merged.before is None:
            return False
        metric = self._settings.metric or next(iter(merged.scores))
        gain = merged.scores[metric] - merged.before[metric]
        return gain > 0 if self._settings.greater_is_better else gain < 0

    def _prepare(self, kind: Kind, weights: Weights, beginning: bool = False) -> None:
        """Check what depends on the model, before the first snapshot."""
        problems = [
            *kind.problems(weights, self._settings.keep, self._base.wanted(kind)),
            *self._base.problems(kind, beginning),
        ]
        if problems:
            raise ConfigError(problems, SUBJECT)
        self._collected.require_own()
        self._base.keep(kind, weights)
        self._kind = kind

    def _take(self, step: int, weights: Weights) -> None:
        require_finite(weights.tensors, step)
        self._collected.add(step, weights, self._the_kind())

    def _the_kind(self) -> Kind:
        assert self._kind is not None, "prepared before"
        return self._kind

    def state_dict(self) -> dict[str, Any]:
        """Snapshots in memory as tensors, those in folders as paths; the running mean; the base."""
        return {
            "method": self._settings.method,
            "saves": self._saves,
            "collected": self._collected.state(),
            "base": self._base.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the snapshots of an earlier run; only the main process does.

        Raises:
            ConfigError: they were collected for another method.
        """
        if state["method"] != self._settings.method:
            expected = f"that of a run with `{self._settings.method}`"
            problem = Problem("state", f"one of `{state['method']}`", expected)
            raise ConfigError([problem], SUBJECT)
        if not processes.is_main():
            return
        self._saves = state["saves"]
        self._collected.load(state["collected"])
        self._base.load(state["base"])
