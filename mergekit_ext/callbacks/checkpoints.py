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
from mergekit_ext.callbacks.comparison import Comparison
from mergekit_ext.callbacks.kinds import Kind, Shape, kind_of_model, kind_of_weights, seen
from mergekit_ext.callbacks.log import LogTo
from mergekit_ext.callbacks.merged import Merged
from mergekit_ext.callbacks.protocol import Callback
from mergekit_ext.callbacks.settings import MEMORY, SUBJECT, Settings
from mergekit_ext.callbacks.state import Saved
from mergekit_ext.callbacks.weights import Weights, read, require_finite, saved
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
            adapter_options={} if adapter_options is None else adapter_options,
            seed=seed,
            device=device,
            evaluate=evaluate,
            task=task,
            metric=metric,
            greater_is_better=greater_is_better,
            load=load,
            keep_better=keep_better,
            callbacks=tuple(callbacks) if isinstance(callbacks, Iterable) else callbacks,
            log=log,
        )
        self._comparison = Comparison(self._settings)
        self._collected = collected(self._settings)
        self._kind: Kind | None = None
        self._base = Base(self._settings)
        self._shapes: dict[str, Shape] | None = None  # of the first snapshot
        self._saves = self._step = 0
        self.result: Merged | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the snapshots that a merge would take; for `average` and `ema` of all so far."""
        return self._collected.steps

    def on_train_begin(self, step: int, model: Any) -> None:
        """Check what depends on the model, and keep the initial weights if they are needed.

        A second training that begins with step 0 begins anew: what the first left is forgotten.
        """
        self._step = step
        if not processes.is_main():
            return
        again = self._kind is not None and step == 0
        if again:
            self._collected.clear()
            self._base.clear()
            self._shapes, self._saves = None, 0
        if self._kind is None or again:
            kind = self._kind or kind_of_model(model, self._settings)
            self._prepare(kind, seen(kind, model, step), beginning=step == 0)

    def on_step_end(self, step: int, model: Any) -> None:
        """Take a snapshot if one is due.

        Raises:
            NonFiniteError: the model holds NaN or infinity; names the tensor and the step.
            ConfigError: see the class; or the model has other tensors than it had.
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
        place = Path(path).resolve()
        adapter = self._settings.adapter
        weights = read(self._kind.saved(place) if self._kind else saved(place, adapter))
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
                merged = self._merge(step)
                merged = self._comparison.scored(merged, model, self._the_kind(), self._step)
            except Exception as raised:
                error = raised
        wanted = processes.agree(merged is not None and self._comparison.wanted(merged), error)
        if error is not None:
            raise error
        if wanted:
            self._kind = self._kind or kind_of_model(model, self._settings)
            self._kind.share(model, None if merged is None else merged.weights)
            merged = None if merged is None else dataclasses.replace(merged, loaded=True)
        self.result = merged
        return merged

    def _prepare(self, kind: Kind, weights: Weights, beginning: bool = False) -> None:
        """Check what depends on the model, before the first snapshot."""
        problems = [
            *kind.problems(weights, self._settings.keep, self._base.wanted(kind)),
            *self._base.problems(kind, beginning),
        ]
        if problems:
            raise ConfigError(problems, SUBJECT)
        self._collected.open()
        self._base.keep(kind, weights)
        if self._settings.on == "step":  # saved folders may have other names
            self._require_base_of(kind, weights)
        self._kind = kind

    def _require_base_of(self, kind: Kind, weights: Weights) -> None:
        base = self._base.weights
        if base is not None and (problems := [*kind.unlike_base(weights, base)]):
            raise ConfigError(problems, SUBJECT)

    def _take(self, step: int, weights: Weights) -> None:
        kind = self._the_kind()
        require_finite(weights.tensors, f"at step {step}")
        if self._shapes is None:
            self._require_base_of(kind, weights)
            self._shapes = weights.shapes
        elif problems := [*kind.unlike(weights, self._shapes)]:
            raise ConfigError(problems, f"the snapshot of step {step}")
        self._collected.add(step, weights, kind)

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
            ConfigError: they were collected for another method, or by another callback; nothing
                was taken over.
        """
        saved = Saved(state)
        method = saved.fields().get("method", Saved(None)).value
        if method != self._settings.method:
            expected = f"that of a run with `{self._settings.method}`"
            problem = Problem("state", f"one of `{method}`", expected)
            raise ConfigError([problem], SUBJECT)
        if not processes.is_main():
            return
        saves, base = saved["saves"].count(), self._base.loaded(saved["base"])
        self._collected.load(saved["collected"])
        self._saves, self._base.weights = saves, base
