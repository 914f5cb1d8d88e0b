"""From a configuration to the files of an accuracy-size curve."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ext.errors import Problem
from mergekit_ext.host import compat
from mergekit_ext.host.flexmerge.sizes import Curve, Evaluate, trace
from mergekit_ext.host.run import listening, parsed, require
from mergekit_ext.report import plotting
from mergekit_ext.report.curve import normalised_mean, plot, write_csv, write_json


def write_curve(
    config_file: Path,
    folder: Path,
    options: MergeOptions,
    sizes: Sequence[float | str],
    algorithms: Sequence[str],
    evaluate: Evaluate | None,
    metric: str | None = None,
    callbacks: Iterable[object] = (),
) -> Curve:
    """Trace the curve and write ``sizes.csv``, ``sizes.json`` and ``sizes.png`` into `folder`.

    Args:
        config_file: a `flexmerge` configuration.
        folder: where the files go; made if it does not exist.
        options: mergekit's.
        sizes: as for `sizes.trace`.
        algorithms: the lines; those of the configuration if empty.
        evaluate: scores a module of a task; None for a table of sizes alone.
        metric: what is drawn; the first that `evaluate` returns by default.
        callbacks: told what happens.
    """
    config = flexmerge_config(config_file, options)
    chosen = tuple(algorithms) or ((config.parameters or {}).get("algorithm", "task_arithmetic"),)
    folder.mkdir(parents=True, exist_ok=True)
    with listening(options, callbacks, os.fspath(folder)) as session:
        curve = trace(config, options, sizes, chosen, evaluate, folder, session.emit)
    write_csv(folder / "sizes.csv", curve.points, curve.reference)
    write_json(folder / "sizes.json", curve.points, curve.reference)
    drawn = metric or next((m for scores in curve.reference.values() for m in scores), None)
    if drawn is not None and plotting.available():
        plot(folder / "sizes.png", curve.points, curve.reference, drawn)
    elif drawn is not None:
        click.echo(f"No plot: {plotting.MISSING}.", err=True)
    click.echo(_table(curve, drawn))
    return curve


def flexmerge_config(path: Path, options: MergeOptions) -> MergeConfiguration:
    """A configuration whose method is `flexmerge`.

    Raises:
        ConfigError: it is another one, or none.
    """
    config = parsed(path.read_text(encoding="utf-8"), options)
    if config.merge_method != "flexmerge":
        found, expected = repr(config.merge_method), "'flexmerge'"
        require([Problem("merge_method", found, expected, "Use mergekit-yaml for other methods.")])
    return compat.ordered(config)


def _table(curve: Curve, metric: str | None) -> str:
    lines = [f"{'algorithm':<20} {'size':>7} {'bytes':>15} {metric or '':>10}"]
    for point in curve.points:
        score = normalised_mean(point.scores, curve.reference, metric) if metric else None
        shown = f"{score:.3f}" if score is not None else ""
        lines.append(f"{point.algorithm:<20} {point.size:7.3f} {point.bytes:15,} {shown:>10}")
    return "\n".join(lines)
