"""The accuracy-size curve: every algorithm at every size, evaluated task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from mergekit_ext.core import memory
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.events import Event, SizeReached
from mergekit_ext.flexmerge.merging import Walk
from mergekit_ext.flexmerge.plan import Planner
from mergekit_ext.flexmerge.runtime import build_module
from mergekit_ext.flexmerge.target import Target
from mergekit_ext.host.flexmerge import prepare
from mergekit_ext.host.flexmerge.engine import Engine
from mergekit_ext.host.flexmerge.needs import need_of, with_models
from mergekit_ext.host.flexmerge.parameters import variant
from mergekit_ext.host.flexmerge.sources import Inputs, Prepared, open_inputs
from mergekit_ext.report.curve import CheckedScores, EvaluationError, Scores, SizePoint

ALL = "all"
# From a module and the name of its task to its scores.
Evaluate = Callable[[Any, str], Mapping[str, float] | float]


class Evaluator:
    """Calls the user's function with one model after the other.

    Args:
        function: scores a module; the higher, the better. It gets a transformers module in
            evaluation mode, on the CPU, whose weights it must not write to (it may move the
            module), and the name of its task. It returns a number, or a mapping from metrics to
            numbers, for a task always with the same metrics.
        quiet: without a progress bar.
        trust_remote_code: as for transformers.
    """

    def __init__(self, function: Evaluate, *, quiet: bool, trust_remote_code: bool = False):
        self._function, self._quiet = function, quiet
        self._trust_remote_code = trust_remote_code
        self._scores = CheckedScores()
        self._bar: Any = None

    @contextmanager
    def counting(self, description: str, total: int) -> Iterator[None]:
        """Show a bar of `total` evaluations."""
        # Loading a model is fast and happens for each evaluation: its bars would hide this one.
        shown_before = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        self._bar = tqdm(total=total, desc=description, unit="model", disable=self._quiet)
        try:
            yield
        finally:
            self._bar.close()
            if shown_before:
                transformers.utils.logging.enable_progress_bar()

    def skip(self, count: int) -> None:
        """Count evaluations that are not needed."""
        self._bar.update(count)

    def score(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        task: str,
        what: str,
        dtype: torch.dtype | None = None,
    ) -> dict[str, float]:
        """Return the scores of one model.

        Args:
            folder: where its ``config.json`` is.
            tensors: all of its tensors.
            task: the name of its task.
            what: the model, as errors call it.
            dtype: that of its parameters, if it is not what its configuration says.

        Raises:
            EvaluationError: the function raised, returned something else than finite numbers, or
                other metrics than before.
        """
        module = build_module(
            folder, dict(tensors), dtype, trust_remote_code=self._trust_remote_code
        )
        try:
            returned = self._function(module, task)
        except Exception as error:
            raise EvaluationError.raised(error, what) from error
        found = self._scores.of(returned, task, what)
        self._bar.update()
        return found


class Tracer:
    """Walks down the sizes with each algorithm.

    Args:
        config: a `flexmerge` configuration; its ``target_size`` and ``algorithm`` are not used.
        options: mergekit's.
        algorithms: names, as ``algorithm:`` takes them.
        sizes: numbers of models, or "all" for the size after every merge. By default 1, 1.5, and
            the whole numbers up to that of the models.
        evaluator: scores a task's model; None for sizes alone, which merges nothing.
        source: the text of the configuration, to look for unknown keys.

    Attributes:
        notes: what became of sizes that an algorithm does not have.

    Raises:
        ConfigError: the configuration is wrong for one of the algorithms, or a size is larger
            than all models together.
    """

    def __init__(
        self,
        config: Any,
        options: Any,
        algorithms: Sequence[str],
        sizes: Sequence[float | str] | None = None,
        evaluator: Evaluator | None = None,
        source: str | None = None,
    ):
        self.notes: list[str] = []
        self._options, self._evaluator = options, evaluator
        self._prepared: dict[str, Prepared] = {}
        for name in dict.fromkeys(algorithms):
            report, found = prepare.check(variant(config, name, algorithms), options, source)
            report.raise_for_problems(f"this configuration and `{name}`")
            assert found is not None
            self._prepared[name] = found
        self._count = len(next(iter(self._prepared.values())).models)
        self._sizes = self._default() if sizes is None else tuple(sizes)
        _require_within(self._sizes, self._count)
        if evaluator is not None:
            self._require_memory()

    def _require_memory(self) -> None:
        """Require memory for the models that are scored, which are in memory whole."""
        largest = max(float(self._count) if size == ALL else float(size) for size in self._sizes)
        found = [
            problem
            for prepared in self._prepared.values()
            for problem in memory.problems(
                with_models(
                    need_of(prepared, self._options), prepared.layout, largest, prepared.forced
                )
            )
        ]
        if found:
            raise ConfigError(dict.fromkeys(found))

    def _default(self) -> tuple[float | str, ...]:
        return (1.0, 1.5, *(float(size) for size in range(2, self._count + 1)))

    def open(self) -> Inputs:
        """The models; downloaded if they are not here."""
        return open_inputs(next(iter(self._prepared.values())), self._options)

    def individual(self, inputs: Inputs) -> Scores:
        """The scores of each task's own model; that of a task is empty without an evaluator."""
        if self._evaluator is None:
            return {task: {} for task in inputs.layout.tasks}
        reader = inputs.reader("cpu")
        found = {}
        with self._evaluator.counting("Individual models", self._count):
            for index, task in enumerate(inputs.layout.tasks):
                tensors = {n: reader.tensor(index, n) for n in inputs.models[index].tensors}
                folder = inputs.folders[index]
                found[task] = self._evaluator.score(
                    folder, tensors, task, f"{task}'s individual model"
                )
        return found

    def points(
        self, inputs: Inputs, analyses_in: Path, emit: Callable[[Event], None]
    ) -> Iterator[SizePoint]:
        """Each algorithm at each size, from large to small.

        Args:
            inputs: from `open`.
            analyses_in: the folder in which an earlier analysis is looked for, and a new one kept.
            emit: gets the events.
        """
        engines = {}
        for name, prepared in self._prepared.items():
            engines[name] = Engine(prepared, inputs, self._options, analyses_in, emit)
            engines[name].keep_analysis()
        asked = {name: self._reached(name, engine.planner) for name, engine in engines.items()}
        total = sum(map(len, asked.values())) * self._count
        counting = self._evaluator.counting("Evaluating", total) if self._evaluator else None
        with counting or nullcontext():
            for name, engine in engines.items():
                yield from self._line(name, engine, inputs, asked[name], emit)

    def _line(
        self,
        name: str,
        engine: Engine,
        inputs: Inputs,
        asked: Sequence[tuple[float, float]],
        emit: Callable[[Event], None],
    ) -> Iterator[SizePoint]:
        walk = Walk(engine.reader, engine.merging)
        scores: Scores = {task: {} for task in inputs.layout.tasks}
        for number, (requested, target) in enumerate(asked):
            plan = engine.planner.plan(Target(models=target))
            size = plan.size
            if self._evaluator is not None:
                changed = walk.go(plan)
                emit(SizeReached(name, size.models, size.bytes))
                if changed or number == 0:
                    what = f"{{}}, `{name}` at size {size.models:.4g}"
                    scores = {
                        task: self._evaluator.score(
                            inputs.folders[index],
                            walk.tensors(index),
                            task,
                            what.format(task),
                            engine.forced,
                        )
                        for index, task in enumerate(inputs.layout.tasks)
                    }
                else:  # no merge in between: the same models
                    self._evaluator.skip(self._count)
            yield SizePoint(name, requested, size.models, size.bytes, scores)

    def _reached(self, name: str, planner: Planner) -> list[tuple[float, float]]:
        """What is asked for and what is planned for it, from large to small.

        What is below the smallest size becomes the smallest, once.

        Raises:
            ConfigError: the algorithm has none of the sizes.
        """
        known = dict.fromkeys(planner.sizes)
        least = min(known)
        numbers = {float(size) for size in self._sizes if size != ALL}
        if ALL in self._sizes:
            # With a base of a wider dtype a masked merge may exceed all models kept apart.
            numbers.update(size for size in known if size <= self._count)
        found: list[tuple[float, float]] = []
        below: list[float] = []
        missing: list[float] = []
        for number in sorted(numbers, reverse=True):
            if number in known or planner.reaches(Target(models=number)):
                found.append((number, number))
            else:
                (below if number < least else missing).append(number)
        if below:
            self.notes.append(
                f"{name}: {_listed(below)} cannot be reached; the least is {least:.6g}."
            )
            if least not in numbers:
                found.append((below[0], least))
        if missing:
            self.notes.append(f"{name}: {_listed(missing)} left out; it has {_listed(known)}.")
        if not found:
            planner.plan(Target(models=missing[0]))  # raises, and says what is expected
        return found


def _require_within(sizes: Sequence[float | str], count: int) -> None:
    above = [size for size in sizes if isinstance(size, float) and size > count]
    if above:
        found, expected = _listed(above), f"sizes from 1 to {count}, the number of models"
        raise ConfigError([Problem("--sizes", found, expected, "Take what is larger out.")])


def _listed(sizes: Iterable[float]) -> str:
    return ", ".join(f"{size:.4g}" for size in sizes)
