"""Merging the checkpoints of one run, or the states of one adapter, while it is trained."""

import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError

from mergekit_ext.callbacks.adapters import AdapterModel, adapter_folder
from mergekit_ext.callbacks.evaluate import Evaluate
from mergekit_ext.callbacks.full import FullModel
from mergekit_ext.callbacks.log import LogTo
from mergekit_ext.callbacks.settings import SUBJECT, Mean, Settings, State
from mergekit_ext.callbacks.snapshots import Merged, Snapshots
from mergekit_ext.callbacks.trainer import from_main, is_divided, is_main, unwrapped
from mergekit_ext.core.parameters import schema_problems
from mergekit_ext.errors import ConfigError, MergeWarning, NonFiniteError, Problem, require, warn
from mergekit_ext.events import Callback
from mergekit_ext.io.staging import new_folder

Kind = FullModel | AdapterModel
_NO_INITIAL = Problem(
    "base",
    "no initial weights: training had begun",
    "the weights of the beginning",
    "Call on_train_begin(0, model) before the first step, give `base=`, or load the state of the "
    "run that is resumed.",
)


class MergeCheckpoints(Settings, Callback):
    """Collects snapshots of the model that is trained, and merges them; docs/callbacks.md.

    Snapshots are saved folders: of models of transformers, or of the adapter alone when the model
    is a PeftModel. They are merged as `mergekit_ext.merge` or `peft_merge.run_config` merges them,
    when training ends and whenever `merge` is called; the last merge is in `result`. In a run of
    several processes the main one keeps and merges.

    Args:
        method: any registered merge method, or `average` or `ema` (parameters `decay`, 0.999, and
            `bias_correction`, true): running means of all snapshots of any module of torch.
        keep, every, start: how many of the last snapshots; of which steps; from which step.
        on: "step", of the live model; or "save": saved checkpoints, merged from where they are.
        where: a folder for this run's snapshots and merges; by default a temporary one.
        base: "initial" (the weights at `on_train_begin`), or a folder.
        parameters, seed, device: of the merges; a factor of added task vectors is `auto` unless it
            is given.
        adapter, adapter_options: of a PeftModel; options of `peft_merge.merge_adapters`.
        evaluate: a function ``(model, task) -> {metric: value}`` that scores the merged weights
            and the model's own, in the model itself, for `task`.
        load: put the merged weights into the model; with `keep_better` only if `metric` is better.
        callbacks: get the events of the merges.
        log: an object with a method ``log(values, step)`` for the scores.

    Raises:
        ConfigError: the arguments are wrong, all at once. What depends on the model is checked
            when it is first seen, at `on_train_begin` or in the first step.
    """

    _kind: Kind | None = None
    _model: Any = None  # as it was last seen, unwrapped
    _store: Snapshots = PrivateAttr()
    _temporary: Any = None
    _mean: Mean | None = None
    _step: int = 0
    _saves: int = 0
    _result: Merged | None = None

    def __init__(self, method: str = "average", **arguments: Any):
        super().__init__(method=method, **arguments)
        if self.where is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="merge-checkpoints-")
        folder = Path(self._temporary.name if self.where is None else self.where).resolve()
        self._store = Snapshots(self.keep, folder, own=self.on == "step")

    @property
    def result(self) -> Merged | None:
        """The last merge, in the main process."""
        return self._result

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the snapshots that a merge would take; for `average` and `ema` of all so far."""
        return tuple(self._mean.steps) if self._mean else self._store.steps

    def on_train_begin(self, step: int, model: Any) -> None:
        """Check what depends on the model, and keep the initial weights if they are needed.

        A second training that begins with step 0 begins anew: what the first left is forgotten.
        """
        if self._kind is not None and step == 0:
            self._store.clear()
            self._kind, self._mean, self._saves = None, None, 0
        self._see(step, model)

    def on_step_end(self, step: int, model: Any) -> None:
        """Take a snapshot if one is due; `NonFiniteError` names a tensor of NaN and the step."""
        if self.on == "save":
            self._step = step
            return
        self._see(step, model)
        kind, model, mean = self._kind, self._model, self._mean
        if kind is None or step < self.start or step % self.every:
            return
        with _at(step):
            if self.running is None:
                self._store.add(step, lambda folder: kind.save(model, folder))
            elif not self.steps or step > self.steps[-1]:
                weight = self.running.weight(len(self.steps) + 1)
                self._mean = kind.blend(mean, model, weight)
                self._mean.steps = [*(mean.steps if mean else ()), step]

    def on_save(self, step: int, path: str | os.PathLike[str]) -> None:
        """Take the saved checkpoint as a snapshot, if they are what is merged."""
        if not is_main() or self.on != "save":
            return
        self._step = step
        self._saves += 1
        if step < self.start or self._saves % self.every:
            return
        kind = self._kind
        adapter = kind.trained if isinstance(kind, AdapterModel) else self.adapter
        folder = adapter_folder(Path(path).resolve(), adapter)
        if kind is None:
            adapted = (folder / "adapter_config.json").exists()
            kind = AdapterModel(self) if adapted else FullModel(self, self._store.initial)
            if self._lacks_initial(kind):
                raise ConfigError([_NO_INITIAL], SUBJECT)
            self._require_mergeable(kind, folder, kind.base)
            self._store.open()
            self._kind = kind
        self._store.add_saved(step, folder)

    def on_train_end(self, step: int, model: Any) -> None:
        """Merge, evaluate, and load if asked; without snapshots a warning."""
        self._step = step
        if from_main(lambda: bool(self.steps)):
            self.merge(model=model)
        elif is_main():
            text = f"no snapshot was taken in {step} steps. Lower `every` or `start`."
            warn(MergeWarning(f"{self.method}: {text}"))

    def merge(self, step: int | None = None, model: Any = None) -> Merged | None:
        """Merge the snapshots that are kept.

        Args:
            step: leave out those of later steps.
            model: evaluate in this model, and load into it, as the arguments of the class say. In
                a run of several processes all must make this call; without a model any may.

        Returns:
            The merge; None in processes that are not the main one.

        Raises:
            ConfigError: there are no snapshots, or too few for the method.
            MergeError: in other processes, if the main one failed.
        """
        if model is None:
            return self._merge(step) if is_main() else None
        inner = unwrapped(model)
        self._is_out_of_reach(inner)
        folder = from_main(lambda: self._merge_into(step, inner))
        if folder is not None and not is_main():
            self._kind_of(inner).load(inner, Path(folder))
        return self._result

    def _merge(self, last: int | None) -> Merged:
        steps = self.steps
        if self._mean is None:
            steps = tuple(step for step in steps if last is None or step <= last)
        if self._kind is None or not steps:
            until = "" if last is None else f" up to step {last} (there are those of {self.steps})"
            remedy = "Call on_step_end (or on_save) while training; look at `every` and `start`."
            problem = Problem("snapshots", f"none{until}", "one at least", remedy)
            raise ConfigError([problem], SUBJECT)
        if self._mean is not None and last is not None and last < steps[-1]:
            expected = f"{steps[-1]} or later: `{self.method}` keeps no snapshots"
            raise ConfigError([Problem("step", str(last), expected)], SUBJECT)
        names = (f"merged-{steps[-1]:08d}{f'-{n}' * (n > 1)}" for n in itertools.count(1))
        out = next(p for p in map(self._store.folder.joinpath, names) if not p.exists())
        if self._mean is not None:
            with new_folder(out, "the running mean") as folder:
                self._kind.save_mean(self._mean, self._model, folder)
        else:
            for callback in self.callbacks:
                if isinstance(callback, LogTo):
                    callback.at(self._step)
            folders = {s: f for s, f in self._store.folders().items() if s in steps}
            self._kind.merge(folders, self._kind.base, out)
        self._result = Merged(out, steps, self.method)
        return self._result

    def _merge_into(self, last: int | None, model: Any) -> str | None:
        """Merge, evaluate and load; return the folder if it was loaded."""
        merged, kind, wanted = self._merge(last), self._kind_of(model), self.load
        if self.evaluate is not None:
            evaluate = self.evaluate
            score = evaluate if isinstance(evaluate, Evaluate) else Evaluate(evaluate)
            before = score(model, self.task)
            metric = self.metric or next(iter(before))
            if metric not in before:
                expected = f"one of {', '.join(before)}, which `evaluate` returns"
                raise ConfigError([Problem("metric", repr(metric), expected)], SUBJECT)
            with kind.loaded(model, merged.path):
                scores = score(model, self.task)
            if self.log is not None:
                values = {f"merged/{name}": value for name, value in scores.items()}
                self.log.log(values | {f"last/{k}": v for k, v in before.items()}, self._step)
            merged = self._result = dataclasses.replace(merged, scores=scores, before=before)
            gain = scores[metric] - before[metric]
            better = gain > 0 if self.greater_is_better else gain < 0
            wanted = self.load and (better or not self.keep_better)
        if not wanted:
            return None
        kind.load(model, merged.path)
        self._result = dataclasses.replace(merged, loaded=True)
        return os.fspath(merged.path)

    def _lacks_initial(self, kind: Kind) -> bool:
        return kind.base == self._store.initial and not self._store.has_initial

    def _kind_of(self, model: Any) -> Kind:
        """Return how a model is handled; PEFT is imported by whatever made a PeftModel."""
        peft = sys.modules.get("peft")
        adapted = peft is not None and isinstance(model, peft.PeftModel)
        return AdapterModel(self) if adapted else FullModel(self, self._store.initial)

    def _see(self, step: int, model: Any) -> None:
        """Check what depends on the model when it is first seen, in the main process.

        The model is saved, as the initial weights if they are needed, and a merge of `keep`
        snapshots like it is checked.
        """
        self._step, inner = step, unwrapped(model)
        if inner is self._model and self._kind is not None:
            return
        self._model = inner
        if self._is_out_of_reach(inner) or self._kind is not None or not is_main():
            return
        kind = self._kind_of(inner)
        problems = [*kind.problems(inner)]
        if (initial := self._lacks_initial(kind)) and step > 0:
            problems.append(_NO_INITIAL)
        require(problems, SUBJECT)
        self._store.open()
        if self.running is None or isinstance(kind, AdapterModel):
            place: AbstractContextManager[Any] = tempfile.TemporaryDirectory(dir=self._store.folder)
            if initial:
                place = new_folder(self._store.initial, "the initial weights")
            with place as name, _at(step):
                saved = Path(name)
                kind.save(inner, saved)
                self._require_mergeable(kind, saved, saved if initial else kind.base)
            self._store.has_initial = initial or self._store.has_initial
        self._kind = kind

    def _is_out_of_reach(self, model: Any) -> bool:
        """Return whether a model's parameters are not here; refuse it if they are needed."""
        divided = is_divided(model)
        if divided and (self.on == "step" or self.load or self.evaluate is not None):
            found = "parameters that are divided among processes (FSDP or ZeRO-3)"
            remedy = 'Save full checkpoints; use `on="save"` without `load` and `evaluate`.'
            problem = Problem("model", found, "whole parameters in every process", remedy)
            raise ConfigError([problem], SUBJECT)
        return divided

    def _require_mergeable(self, kind: Kind, folder: Path, base: Path | None) -> None:
        with tempfile.TemporaryDirectory() as links:
            snapshots = {n: Path(links) / f"step-{n}" for n in range(1, self.keep + 1)}
            for link in snapshots.values():
                link.symlink_to(folder)
            require(kind.merge_problems(snapshots, base), f"a merge of {self.keep} snapshots")

    def state_dict(self) -> dict[str, Any]:
        """Return the steps and folders of the snapshots; or the running mean, as tensors."""
        return State(
            method=self.method,
            saves=self._saves,
            folder=os.fspath(self._store.folder),
            snapshots={step: os.fspath(p) for step, p in self._store.folders().items()},
            initial=self._store.has_initial,
            mean=self._mean,
        ).model_dump()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the snapshots of an earlier run, in the main process.

        Raises:
            ConfigError: it is no state of a run with this method; nothing was taken over.
        """
        try:
            found = State.model_validate(state)
        except ValidationError as error:
            raise ConfigError(schema_problems(error, state, "state"), SUBJECT) from None
        if found.method != self.method:
            problem = Problem("state", f"one of `{found.method}`", f"one of `{self.method}`")
            raise ConfigError([problem], SUBJECT)
        if is_main():
            self._store.load(found)
            self._saves, self._mean = found.saves, found.mean


@contextmanager
def _at(step: int) -> Iterator[None]:
    """Name the step in the error of a tensor that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        where = f"at step {step}"
        raise NonFiniteError(error.tensor, where, error.count, error.size) from None
