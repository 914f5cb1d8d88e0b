"""From a configuration to the files of an accuracy-size curve."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ext.errors import Problem
from mergekit_ext.flexmerge.options import DEFAULT_ALGORITHM
from mergekit_ext.host.commands import parsed
from mergekit_ext.host.flexmerge.sizes import Evaluate, Evaluator, Tracer
from mergekit_ext.host.run import ordered, require
from mergekit_ext.host.session import listening
from mergekit_ext.io.documents import text_of
from mergekit_ext.io.staging import place_problems
from mergekit_ext.report.curve import (
    Scores,
    SizePoint,
    mean,
    normalised_mean,
    plot,
    write_csv,
    write_json,
)


@dataclass(frozen=True)
class Curve:
    """What was scored.

    Attributes:
        reference: the scores of each task's own model.
        points: those of each algorithm at each size, from large to small.
    """

    reference: Scores
    points: Sequence[SizePoint]


def write_curve(
    config_file: Path,
    folder: Path,
    options: MergeOptions,
    sizes: Sequence[float | str] | None = None,
    algorithms: Sequence[str] = (),
    evaluate: Evaluate | None = None,
    metric: str | None = None,
    callbacks: Iterable[object] = (),
) -> Curve:
    """Trace the curve and write ``sizes.csv``, ``sizes.json`` and ``sizes.png`` into `folder`.

    The tables are written anew after every size that is scored: what is done is kept, whatever
    comes later.

    Args:
        config_file: a `flexmerge` configuration.
        folder: where the files go; made if it does not exist.
        options: mergekit's.
        sizes: as for `sizes.Tracer`.
        algorithms: the lines; those of the configuration if empty.
        evaluate: scores a module of a task, see `sizes.Evaluator`; None for a table of sizes.
        metric: what is drawn; the first that `evaluate` returns by default.
        callbacks: get the events.

    Raises:
        ConfigError: something is wrong with the configuration, `folder` or `metric`.
        EvaluationError: `evaluate` raised, or did not return scores.
    """
    config, source = flexmerge_config(config_file)
    chosen = tuple(algorithms) or (
        str((config.parameters or {}).get("algorithm", DEFAULT_ALGORITHM)),
    )
    if metric is not None and evaluate is None:
        require([Problem("--metric", repr(metric), "`--evaluate` as well", "Say what scores.")])
    evaluator = (
        None
        if evaluate is None
        else Evaluator(evaluate, quiet=options.quiet, trust_remote_code=options.trust_remote_code)
    )
    tracer = Tracer(config, options, chosen, sizes, evaluator, source)
    require_folder(folder, config)
    points: list[SizePoint] = []
    with listening(options, callbacks, os.fspath(folder)) as session:
        inputs = tracer.open()
        reference = tracer.individual(inputs)
        drawn = _metric(metric, reference)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for point in tracer.points(inputs, folder, session.emit):
                points.append(point)
                if evaluator is not None:
                    _write(folder, points, reference)
        except BaseException:
            if points and evaluator is not None:
                click.echo(f"Stopped; the first {len(points)} sizes are in {folder}.", err=True)
            raise
    _write(folder, points, reference)
    for note in (*tracer.notes, *_partial(reference)):
        click.echo(f"Note: {note}", err=True)
    if drawn is not None:
        _draw(folder / "sizes.png", points, reference, drawn)
    click.echo(_table(points, reference, drawn))
    return Curve(reference, points)


def flexmerge_config(path: Path) -> tuple[MergeConfiguration, str]:
    """A configuration whose method is `flexmerge`, and its text.

    Raises:
        ConfigError: it is another one, or none.
    """
    source = text_of(path)
    config = parsed(source)
    if config.merge_method != "flexmerge":
        found, expected = repr(config.merge_method), "'flexmerge'"
        require([Problem("merge_method", found, expected, "Use mergekit-yaml for other methods.")])
    return ordered(config), source


def require_folder(folder: Path, config: MergeConfiguration) -> None:
    """Raise `ConfigError` unless tables can be written into `folder`."""
    inputs = [model.model.path for model in config.referenced_models()]
    require(list(place_problems(folder, "OUT_PATH", inputs)))


def _metric(asked: str | None, reference: Scores) -> str | None:
    known = list(dict.fromkeys(metric for scores in reference.values() for metric in scores))
    if asked is not None and asked not in known:
        require([Problem("--metric", repr(asked), f"one of {', '.join(known)}")])
    return asked or next(iter(known), None)


def _partial(reference: Scores) -> list[str]:
    """What the means of metrics are over that not every task has."""
    known = dict.fromkeys(metric for scores in reference.values() for metric in scores)
    having = {m: [task for task, scores in reference.items() if m in scores] for m in known}
    return [
        f"{metric}: means are over {', '.join(tasks)} alone; no other task has it."
        for metric, tasks in having.items()
        if len(tasks) < len(reference)
    ]


def _write(folder: Path, points: Sequence[SizePoint], reference: Scores) -> None:
    write_csv(folder / "sizes.csv", points, reference)
    write_json(folder / "sizes.json", points, reference)


def _draw(path: Path, points: Sequence[SizePoint], reference: Scores, metric: str) -> None:
    try:
        plot(path, points, reference, metric)
    except (ImportError, ValueError) as error:
        # One of an earlier run would not belong to the tables.
        path.unlink(missing_ok=True)
        click.echo(f"No plot: {error}.", err=True)


def _table(points: Sequence[SizePoint], reference: Scores, metric: str | None) -> str:
    head = f"{'algorithm':<20} {'size':>7} {'bytes':>15}"
    lines = [head if metric is None else f"{head} {f'mean {metric}':>18} {'normalised':>10}"]
    for point in points:
        line = f"{point.algorithm:<20} {point.size:7.3f} {point.bytes:15,}"
        if metric is not None:
            ratio = normalised_mean(point.scores, reference, metric)
            shown = "" if ratio is None else f"{ratio:.3f}"
            line += f" {mean(point.scores, metric):18.4f} {shown:>10}"
        lines.append(line)
    return "\n".join(lines)
