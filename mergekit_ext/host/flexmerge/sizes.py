"""The accuracy-size curve: every algorithm at every size, evaluated task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_ext import memory
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.events import Event, SizeReached
from mergekit_ext.flexmerge.merging import Walk
from mergekit_ext.flexmerge.plan import Planner
from mergekit_ext.flexmerge.target import Target
from mergekit_ext.host.flexmerge import prepare
from mergekit_ext.host.flexmerge.engine import Engine
from mergekit_ext.host.flexmerge.evaluation import Evaluator
from mergekit_ext.host.flexmerge.needs import need_of, with_models
from mergekit_ext.host.flexmerge.parameters import variant
from mergekit_ext.host.flexmerge.sources import Inputs, Prepared, open_inputs
from mergekit_ext.report.curve import Scores, SizePoint

ALL = "all"


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
            self._require_room()

    def _require_room(self) -> None:
        """Models that are scored are in memory, whole."""
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
        self, inputs: Inputs, neighbours: Path, emit: Callable[[Event], None]
    ) -> Iterator[SizePoint]:
        """Each algorithm at each size, from large to small.

        Args:
            inputs: from `open`.
            neighbours: the folder in which an earlier analysis is looked for, and a new one kept.
            emit: told what happens.
        """
        engines = {}
        for name, prepared in self._prepared.items():
            engines[name] = Engine(prepared, inputs, self._options, neighbours, emit)
            engines[name].keep_analysis()
        asked = {name: self._reached(name, engine.planner) for name, engine in engines.items()}
        if self._evaluator is None:
            for name, engine in engines.items():
                yield from _sizes_alone(name, engine.planner, asked[name], inputs.layout.tasks)
            return
        total = sum(map(len, asked.values())) * self._count
        with self._evaluator.counting("Evaluating", total):
            for name, engine in engines.items():
                yield from self._line(name, engine, inputs, asked[name], self._evaluator, emit)

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

    def _line(
        self,
        name: str,
        engine: Engine,
        inputs: Inputs,
        asked: Sequence[tuple[float, float]],
        evaluator: Evaluator,
        emit: Callable[[Event], None],
    ) -> Iterator[SizePoint]:
        walk = Walk(engine.reader, engine.merging)
        scores: Scores | None = None
        for requested, target in asked:
            plan = engine.planner.plan(Target(models=target))
            changed = walk.go(plan)
            emit(SizeReached(name, plan.size.models, plan.size.bytes))
            if scores is not None and not changed:
                # Two sizes asked for with no merge in between: the same models.
                evaluator.skip(self._count)
            else:
                what = f"{{}}, `{name}` at size {plan.size.models:.4g}"
                scores = {
                    task: evaluator.score(
                        inputs.folders[index],
                        walk.tensors(index),
                        task,
                        what.format(task),
                        engine.forced,
                    )
                    for index, task in enumerate(inputs.layout.tasks)
                }
            yield SizePoint(name, requested, plan.size.models, plan.size.bytes, scores)


def _sizes_alone(
    name: str, planner: Planner, asked: Sequence[tuple[float, float]], tasks: Sequence[str]
) -> Iterator[SizePoint]:
    for requested, target in asked:
        size = planner.plan(Target(models=target)).size
        yield SizePoint(name, requested, size.models, size.bytes, {task: {} for task in tasks})


def _require_within(sizes: Sequence[float | str], count: int) -> None:
    above = [size for size in sizes if isinstance(size, float) and size > count]
    if above:
        found, expected = _listed(above), f"sizes from 1 to {count}, the number of models"
        raise ConfigError([Problem("--sizes", found, expected, "Take what is larger out.")])


def _listed(sizes: Iterable[float]) -> str:
    return ", ".join(f"{size:.4g}" for size in sizes)
