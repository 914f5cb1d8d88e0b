"""The accuracy-size curve: every algorithm at every size, scored task by task, and its files."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

from mergekit_ext.core import memory
from mergekit_ext.errors import ConfigError, Problem, require, shown
from mergekit_ext.flexmerge.merging import Walk
from mergekit_ext.flexmerge.plan import Planner
from mergekit_ext.flexmerge.runtime import build_module
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.flexmerge.storage import Target
from mergekit_ext.host.flexmerge.engine import Engine, open_inputs
from mergekit_ext.host.flexmerge.needs import need_of
from mergekit_ext.host.flexmerge.prepare import prepare_tables
from mergekit_ext.host.flexmerge.shared_tensors import Prepared
from mergekit_ext.host.interface import interface
from mergekit_ext.host.session import listening
from mergekit_ext.io.class_model import without_bars
from mergekit_ext.report import tables

ALL = "all"
# From a module and the name of its task to its scores.
Evaluate = Callable[[Any, str], Mapping[str, float] | float]
Sizes = Sequence[float | str]


class Curve(NamedTuple):
    """The scores of each task's own model, and those of each algorithm from large to small.

    As text, a table of the means of `metric`.
    """

    reference: tables.Scores
    points: Sequence[tables.SizePoint]
    metric: str | None
    notes: Sequence[str]

    def __str__(self) -> str:
        metric = self.metric
        head = f"{'algorithm':<20} {'size':>7} {'bytes':>15}"
        lines = [head if metric is None else f"{head} {f'mean {metric}':>18} {'normalised':>10}"]
        for point in self.points:
            line = f"{point.algorithm:<20} {memory.in_models(point.size):7.3f} {point.bytes:15,}"
            if metric is not None:
                ratio = tables.normalised(point.scores, self.reference, metric)
                shown = "" if ratio is None else f"{ratio[0]:.3f}"
                line += f" {tables.mean(point.scores, metric):18.4f} {shown:>10}"
            lines.append(line)
        return "\n".join(lines)


@interface
def sizes(
    config: Any,
    out: str | os.PathLike[str],
    options: MergeOptions | None = None,
    sizes: Sizes | None = None,
    algorithms: Sequence[str] = (),
    evaluate: Evaluate | None = None,
    metric: str | None = None,
    callbacks: Iterable[object] = (),
    *,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> Curve:
    """Merge a `flexmerge` configuration at many sizes, in memory, and score each.

    Args:
        config: as for `merge`; its `target_size` is not used.
        out: a folder that gets sizes.csv, sizes.json, sizes.png and the analysis. Tables are
            written after every size: what is done is kept, as sizes-1 by the next run.
        options, callbacks, max_memory, allow_pickle: as for `merge`.
        sizes: numbers of models, or "all" for the size after every merge; by default 1, 1.5, 2, ...
        algorithms: names, one line of the curve each; by default that of the configuration.
        evaluate: ``evaluate(model, task)`` scores a transformers module in evaluation mode, on the
            CPU, whose weights it must not write to: a number, or a mapping from metrics to numbers.
            Without it nothing is merged.
        metric: what is drawn; by default the first that `evaluate` returns.

    Raises:
        ConfigError: with all that is wrong with the configuration, for one of the algorithms, with
            `out`, `metric`, or a size, which is larger than all models together.
        EvaluationError: `evaluate` raised, or did not return scores.

    Example:
        >>> print(mergekit_ext.sizes("flex.yml", "curve", sizes=[1, 1.5, 2], evaluate=score))
    """
    options, folder = options or MergeOptions(), Path(os.path.expanduser(out))
    if metric is not None and evaluate is None:
        require([Problem("--metric", repr(metric), "`--evaluate` as well", "Say what scores.")])
    lines, wanted = _prepared(config, folder, options, algorithms, sizes, evaluate is not None)
    evaluator = None if evaluate is None else Evaluator(evaluate, options)
    points: list[tables.SizePoint] = []
    notes: list[str] = []
    with listening(options, callbacks, os.fspath(folder)) as session, ExitStack() as stack:
        reader, folders = open_inputs(next(iter(lines.values())))
        reference = _individual(reader, folders, evaluator)
        metrics = dict.fromkeys(metric for scores in reference.values() for metric in scores)
        if metric is not None and metric not in metrics:
            require([Problem("--metric", repr(metric), f"one of {', '.join(metrics)}")])
        folder.mkdir(parents=True, exist_ok=True)
        engines = {}
        for name, prepared in lines.items():
            scratch = Path(stack.enter_context(TemporaryDirectory(dir=folder)))
            engines[name] = Engine(prepared, reader, folder, session, scratch)
            if engines[name].merging.residuals is None:
                engines[name].save_analysis(folder)
        asked = {name: _asked(name, e.planner, wanted, notes) for name, e in engines.items()}
        notes += _set_aside(folder)
        total = sum(map(len, asked.values())) * len(reference)
        try:
            with evaluator.counting("Evaluating", total) if evaluator else nullcontext():
                for name, engine in engines.items():
                    for point in _line(name, engine, folders, asked[name], evaluator):
                        points.append(point)
                        if evaluator is not None:
                            tables.write_curve_tables(folder, points, reference)
        except BaseException:
            if points and evaluator is not None:
                click.echo(f"Stopped; the first {len(points)} sizes are in {folder}.", err=True)
            raise
    tables.write_curve_tables(folder, points, reference)
    for name in metrics:
        having = [task for task, scores in reference.items() if name in scores]
        if len(having) < len(reference):
            alone = f"means are over {', '.join(having)} alone; no other task has it."
            notes.append(f"{name}: {alone}")
    drawn = metric or next(iter(metrics), None)
    if drawn is not None:
        try:
            tables.plot(folder / "sizes.png", points, reference, drawn)
        except (ImportError, ValueError) as error:
            notes.append(f"no plot: {error}.")
    return Curve(reference, points, drawn, notes)


def _set_aside(folder: Path) -> list[str]:
    """Rename the curve of an earlier run, whose scores took time, and say so."""
    earlier = list(folder.glob("sizes.*"))
    number = next(n for n in itertools.count(1) if not any(folder.glob(f"sizes-{n}.*")))
    for path in earlier:
        path.rename(folder / f"sizes-{number}{path.suffix}")
    return [f"The curve of the run before is sizes-{number} now."] if earlier else []


def _prepared(
    config: Any,
    folder: Path,
    options: Any,
    algorithms: Sequence[str],
    sizes: Sizes | None,
    scored: bool,
) -> tuple[dict[str, Prepared], Sizes]:
    """Return a prepared merge for each algorithm, and the sizes, which all of them may have."""
    if sizes is not None:
        listed = [] if isinstance(sizes, str) or not isinstance(sizes, Iterable) else [*sizes]
        if not listed:
            expected = "a list of sizes, one at least"
            require([Problem("sizes", shown(sizes), expected, "Write [1, 1.5, 2].")])
        sizes = list(map(_size, listed))
    found = prepare_tables(config, folder, options, algorithms).items()
    lines = {name: prepared for name, (_, prepared) in found}
    count = len(next(iter(lines.values())).layout.tasks)
    if sizes is None:
        sizes = [1.0, 1.5, *map(float, range(2, count + 1))]
    numbers = [float(count) if size == ALL else float(size) for size in sizes]
    if above := [number for number in numbers if number > count]:
        expected = f"sizes from 1 to {count}, the number of models"
        require([Problem("--sizes", _listed(above), expected, "Take what is larger out.")])
    if scored:
        needs = [need_of(prepared, scored=max(numbers)) for prepared in lines.values()]
        require(list(dict.fromkeys(p for need in needs for p in memory.problems(need))))
    return lines, sizes


def _size(given: float | str) -> float | str:
    """Return a number of models, which may be given as text, or `ALL`."""
    text = str(given).strip()
    with suppress(ValueError):
        if text == ALL or 1 <= float(text) < float("inf"):
            return ALL if text == ALL else float(text)
    expected = f"numbers from 1, or `{ALL}`"
    raise ConfigError([Problem("--sizes", shown(given), expected, "Write 1,1.5,2.")])


class Evaluator:
    """Calls the user's function (see `sizes`) with one model after the other."""

    def __init__(self, function: Evaluate, options: MergeOptions):
        self._function, self.options = function, options
        self._metrics: dict[str, set[str]] = {}
        self.bar: Any = None

    @contextmanager
    def counting(self, description: str, total: int) -> Iterator[None]:
        """Show a bar of `total` evaluations."""
        shown = {"desc": description, "unit": "model", "disable": self.options.quiet}
        # Loading a model is fast and happens for each evaluation: its bars would hide this one.
        with without_bars(), tqdm(total=total, **shown) as self.bar:
            yield

    def score(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        task: str,
        what: str,
        dtype: torch.dtype | None = None,
    ) -> dict[str, float]:
        """Return the scores of one model, whose ``config.json`` is in `folder`.

        Errors call it `what`. A `dtype` is that of its parameters, if its configuration says
        another.
        """
        trust = self.options.trust_remote_code
        module = build_module(folder, dict(tensors), dtype, trust_remote_code=trust)
        found = tables.scores_of(self._function, module, task, what, self._metrics)
        self.bar.update()
        return found


def _individual(
    reader: BlockReader, folders: Sequence[Path], evaluator: Evaluator | None
) -> dict[str, Mapping[str, float]]:
    """Return the scores of each task's own model; those of a task are empty without evaluator."""
    found: dict[str, Mapping[str, float]] = {task: {} for task in reader.layout.tasks}
    if evaluator is None:
        return found
    with evaluator.counting("Individual models", len(found)):
        for task, model, folder in zip(found, reader.models, folders, strict=True):
            tensors = {name: model.tensor(name) for name in model.tensors}
            found[task] = evaluator.score(folder, tensors, task, f"{task}'s individual model")
    return found


def _line(
    name: str,
    engine: Engine,
    folders: Sequence[Path],
    asked: Sequence[tuple[float, float]],
    evaluator: Evaluator | None,
) -> Iterator[tables.SizePoint]:
    """Yield one algorithm at each size; only blocks that change are merged again."""
    walk = Walk(engine.reader, engine.merging)
    scores: tables.Scores = {task: {} for task in engine.layout.tasks}
    for number, (requested, target) in enumerate(asked):
        plan = engine.planner.plan(Target(models=target))
        size = plan.size
        if evaluator is not None:
            changed = walk.go(plan)
            engine.reached(plan)
            if changed or number == 0:
                what, forced = f"`{name}` at size {size.models:.4g}", engine.prepared.forced
                scores = {
                    task: evaluator.score(
                        home, walk.tensors(index), task, f"{task}, {what}", forced
                    )
                    for index, (task, home) in enumerate(zip(scores, folders, strict=True))
                }
            else:  # no merge in between: the same models
                evaluator.bar.update(len(scores))
        yield tables.SizePoint(name, requested, size.models, size.bytes, scores)


def _asked(
    name: str, planner: Planner, sizes: Sizes, notes: list[str]
) -> list[tuple[float, float]]:
    """Return what is asked for and what is planned for it, from large to small.

    What is below the smallest size becomes the smallest, once. `notes` receives what is left out.
    `ConfigError` if the algorithm has none of the sizes.
    """
    known, least = planner.sizes, min(planner.sizes)
    numbers = {float(size) for size in sizes if size != ALL}
    if ALL in sizes:
        # With a base of a wider dtype a masked merge may exceed all models kept apart.
        numbers.update(size for size in known if size <= planner.storage.tasks)
    found: list[tuple[float, float]] = []
    below: list[float] = []
    missing: list[float] = []
    for number in sorted(numbers, reverse=True):
        if planner.reaches(Target(models=number)):
            found.append((number, number))
        else:
            (below if number < least else missing).append(number)
    if below:
        notes.append(
            f"{name}: {_listed(below)} cannot be reached; the least is {_listed([least])}."
        )
        if least not in numbers:
            found.append((below[0], least))
    if missing:
        notes.append(f"{name}: {_listed(missing)} left out; it has {_listed(known)}.")
    if not found:
        planner.plan(Target(models=missing[0]))  # raises, and says what is expected
    return found


def _listed(sizes: Iterable[float]) -> str:
    return ", ".join(f"{memory.in_models(size):.10g}" for size in sizes)
