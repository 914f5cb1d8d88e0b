"""The accuracy-size curve: every algorithm at every size, evaluated task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from mergekit_ext.errors import MergekitExtError
from mergekit_ext.events import Event, SizeReached
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.runtime import build_module
from mergekit_ext.flexmerge.target import Target
from mergekit_ext.flexmerge.walk import Walk
from mergekit_ext.host.flexmerge import prepare
from mergekit_ext.host.flexmerge.engine import Engine
from mergekit_ext.host.flexmerge.sources import Inputs, open_inputs
from mergekit_ext.report.curve import Scores, SizePoint

# From a module and the name of its task to its scores.
Evaluate = Callable[[Any, str], Mapping[str, float] | float]
ALL = "all"


class EvaluationError(MergekitExtError, ValueError):
    """What was to score a model did not return scores."""


@dataclass(frozen=True)
class Curve:
    """What was scored.

    Attributes:
        reference: the scores of each task's own model.
        points: those of each algorithm at each size, from large to small.
    """

    reference: Scores
    points: Sequence[SizePoint]


def trace(
    config: Any,
    options: Any,
    sizes: Sequence[float | str],
    algorithms: Sequence[str],
    evaluate: Evaluate | None,
    neighbours: Path,
    emit: Callable[[Event], None],
) -> Curve:
    """Walk down the sizes with each algorithm.

    Args:
        config: a `flexmerge` configuration; its ``target_size`` and ``algorithm`` are not used.
        options: mergekit's.
        sizes: numbers of models, or "all" for the size after every merge. A size that an
            algorithm cannot reach is left out for it.
        algorithms: names, as ``algorithm:`` takes them.
        evaluate: scores one task's module; None for sizes alone.
        neighbours: the folder in which an earlier analysis is looked for, and a new one kept.
        emit: told what happens.
    """
    # Loading is fast and happens for every task and size; its bars would hide ours.
    transformers.utils.logging.disable_progress_bar()
    prepared = [_prepared(config, options, name) for name in algorithms]
    inputs = open_inputs(prepared[0], options)
    engines = [Engine(p, inputs, options, neighbours, emit) for p in prepared]
    reference = _individual(inputs, evaluate)
    points: list[SizePoint] = []
    for name, engine in zip(algorithms, engines, strict=True):
        engine.keep_analysis()
        points.extend(_line(name, engine, inputs, sizes, evaluate, emit))
    return Curve(reference, points)


def with_parameters(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with other shared parameters."""
    parameters = {**(config.parameters or {}), **changes}
    return config.model_copy(update={"parameters": parameters})


def _prepared(config: Any, options: Any, algorithm: str) -> prepare.Prepared:
    models = [m for m in config.models or () if m.model != config.base_model]
    changed = with_parameters(config, {"algorithm": algorithm, "target_size": float(len(models))})
    report, found = prepare.check(changed, options)
    report.raise_for_problems(f"`{algorithm}`")
    assert found is not None
    return found


def _individual(inputs: Inputs, evaluate: Evaluate | None) -> Scores:
    reader = inputs.reader("cpu")
    found = {}
    for index, (task, folder) in enumerate(zip(inputs.layout.tasks, inputs.folders, strict=True)):
        tensors = {name: reader.tensor(index, name) for name in inputs.models[index].tensors}
        found[task] = _scores(evaluate, folder, tensors, task)
    return found


def _line(
    name: str,
    engine: Engine,
    inputs: Inputs,
    sizes: Sequence[float | str],
    evaluate: Evaluate | None,
    emit: Callable[[Event], None],
) -> Iterator[SizePoint]:
    walk = Walk(engine.reader, engine.algorithm, engine.cuts, engine.forced)
    for requested, plan in _plans(engine, sizes):
        walk.go(plan)
        scores = {
            task: _scores(evaluate, folder, walk.tensors(index), task)
            for index, (task, folder) in enumerate(
                zip(inputs.layout.tasks, inputs.folders, strict=True)
            )
        }
        emit(SizeReached(name, plan.size.models, plan.size.bytes))
        yield SizePoint(name, requested, plan.size.models, plan.size.bytes, scores)


def _plans(engine: Engine, sizes: Sequence[float | str]) -> Iterable[tuple[float, Plan]]:
    """The plans of the sizes, from large to small; for those out of reach the smallest, once."""
    planner = engine.planner
    numbers = {float(size) for size in sizes if size != ALL}
    if ALL in sizes:
        numbers.update(planner.sizes)
    least = min(planner.sizes)
    for number in sorted((n for n in numbers if n >= least), reverse=True):
        if planner.reaches(Target(models=number)):
            yield number, planner.plan(Target(models=number))
    below = [number for number in numbers if number < least]
    if below and least not in numbers:
        yield max(below), planner.plan(Target(models=least))


def _scores(
    evaluate: Evaluate | None, folder: Path, tensors: Mapping[str, Any], task: str
) -> dict[str, float]:
    if evaluate is None:
        return {}
    found = evaluate(build_module(folder, dict(tensors)), task)
    if isinstance(found, (int, float)):
        found = {"score": float(found)}
    if not isinstance(found, Mapping) or not all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in found.values()
    ):
        raise EvaluationError(
            f"the evaluation of {task} returned {found!r}; expected a mapping from metrics to "
            "finite numbers, such as {'accuracy': 0.9}."
        )
    return {str(metric): float(value) for metric, value in found.items()}
