"""Accuracy against size: the table, the JSON file and the plot of FlexMerge's trade-off."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_ext.report.plotting import figure

Scores = Mapping[str, Mapping[str, float]]
CURVE_FORMAT = 1


@dataclass(frozen=True)
class SizePoint:
    """What one algorithm scored at one size.

    Attributes:
        algorithm: the name of its line.
        requested: the target size, in models.
        size: the size that was reached, in models.
        bytes: everything that is stored, masks and base included.
        scores: {task: {metric: value}}; the higher, the better.
    """

    algorithm: str
    requested: float
    size: float
    bytes: int
    scores: Scores


def mean(scores: Scores, metric: str) -> float:
    """Return the mean of `metric` over the tasks that have it."""
    values = [of_task[metric] for of_task in scores.values() if metric in of_task]
    return math.fsum(values) / len(values)


def normalised_mean(scores: Scores, reference: Scores, metric: str) -> float | None:
    r"""Return :math:`\frac1m \sum_k s_k / r_k`: scores relative to the individual models'.

    Args:
        scores: of the merged model.
        reference: of the individual model of each task; 1 means that nothing was lost.
        metric: the mean is over the tasks that have it.

    None if a task's reference is not above zero: there is no ratio then.
    """
    pairs = [(of[metric], reference[task][metric]) for task, of in scores.items() if metric in of]
    if not all(whole > 0 for _, whole in pairs):
        return None
    return math.fsum(part / whole for part, whole in pairs) / len(pairs)


def write_csv(path: Path, points: Sequence[SizePoint], reference: Scores) -> None:
    """Write one row for each algorithm and size.

    Columns: ``algorithm``, ``requested``, ``size``, ``bytes``, a ``<task>/<metric>`` for each
    score, and ``mean/<metric>`` and ``normalised/<metric>`` (empty where there is no ratio).

    Raises:
        ValueError: a point does not have exactly the tasks and metrics of `reference`.
    """
    _check(points, reference)
    keys, metrics = _keys(reference), _metrics(reference)
    head = ["algorithm", "requested", "size", "bytes", *(f"{t}/{m}" for t, m in keys)]
    head += [f"{kind}/{metric}" for metric in metrics for kind in ("mean", "normalised")]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for point in points:
            row: list[object] = [point.algorithm, point.requested, point.size, point.bytes]
            row += [point.scores[task][metric] for task, metric in keys]
            for metric in metrics:
                row.append(mean(point.scores, metric))
                row.append(normalised_mean(point.scores, reference, metric))
            writer.writerow(row)


def write_json(path: Path, points: Sequence[SizePoint], reference: Scores) -> None:
    """Write everything: the reference, and each point with its means.

    JSON has no NaN and no infinity; such a score becomes the string that `float` reads back.

    Raises:
        ValueError: a point does not have exactly the tasks and metrics of `reference`.
    """
    _check(points, reference)
    metrics = _metrics(reference)
    rows = [
        {
            "algorithm": point.algorithm,
            "requested": point.requested,
            "size": point.size,
            "bytes": point.bytes,
            "scores": _plain(point.scores),
            "mean": {metric: _number(mean(point.scores, metric)) for metric in metrics},
            "normalised": {
                metric: _number(normalised_mean(point.scores, reference, metric))
                for metric in metrics
            },
        }
        for point in points
    ]
    content = {"format_version": CURVE_FORMAT, "reference": _plain(reference), "points": rows}
    text = json.dumps(content, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def plot(path: Path, points: Sequence[SizePoint], reference: Scores, metric: str) -> None:
    """Draw normalised means over sizes, one line for each algorithm (FlexMerge, figures 3 and 5).

    Args:
        path: the picture; its suffix (``.png``, ``.svg``, ``.pdf``) is its format.
        points: in any order.
        reference: scores of the individual models, which are the dashed line at 1.
        metric: which of the metrics.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `metric` is not in `reference`, has no ratio, or a point does not have exactly
            the tasks and metrics of `reference`.
    """
    picture = figure(6.0, 4.2)
    _check(points, reference)
    if metric not in _metrics(reference):
        known = ", ".join(_metrics(reference))
        raise ValueError(f"the metric is {metric!r}; expected one of {known}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        height = normalised_mean(point.scores, reference, metric)
        if height is None:
            raise ValueError(
                f"{metric} of an individual model is not above zero; expected a score "
                "that others can be divided by"
            )
        lines.setdefault(point.algorithm, []).append((point.size, height))
    axes = picture.add_subplot()
    axes.axhline(1.0, linestyle="--", color="0.4", label="individual models")
    for algorithm, line in lines.items():
        sizes, heights = zip(*sorted(line), strict=True)
        axes.plot(sizes, heights, marker="o", markersize=4, label=algorithm)
    axes.set_xlabel("size (models)")
    axes.set_ylabel(f"normalised {metric}")
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=150)


def _keys(scores: Scores) -> list[tuple[str, str]]:
    return [(task, metric) for task, of_task in scores.items() for metric in of_task]


def _metrics(reference: Scores) -> list[str]:
    return list(dict.fromkeys(metric for _, metric in _keys(reference)))


def _check(points: Iterable[SizePoint], reference: Scores) -> None:
    wanted = set(_keys(reference))
    problems = []
    for point in points:
        found = set(_keys(point.scores))
        for said, keys in (("lacks", wanted - found), ("alone has", found - wanted)):
            if keys:
                names = ", ".join(sorted(f"{task}/{metric}" for task, metric in keys))
                problems.append(f"{point.algorithm} at size {point.size:g} {said} {names}")
    if problems:
        raise ValueError(
            "every point must have the scores that the individual models have: "
            + "; ".join(problems)
        )


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(float(value))


def _plain(scores: Scores) -> dict[str, dict[str, float | str | None]]:
    return {
        task: {metric: _number(value) for metric, value in of_task.items()}
        for task, of_task in scores.items()
    }
