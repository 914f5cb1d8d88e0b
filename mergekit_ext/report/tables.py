"""Scores and similarities of FlexMerge: their tables and plots.

Rows of an analysis are those of its CSV files, by column.
"""

import csv
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from mergekit_ext.core.memory import in_models
from mergekit_ext.errors import MergekitExtError, shown

Scores = Mapping[str, Mapping[str, float]]
CURVE_FORMAT = 1
Rows = Sequence[Mapping[str, Any]]
# Of each task, by its first model.
Metrics = dict[str, set[str]]
# The metric of a function that returns one number.
SCORE = "score"
_PACKAGE = Path(__file__).parents[1]


class EvaluationError(MergekitExtError, ValueError):
    """What was to score a model did not return scores."""

    @classmethod
    def raised(cls, error: Exception, what: str) -> "EvaluationError":
        """Return the error of an evaluation of `what` that raised: with its frames, not ours."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _PACKAGE not in Path(frame.filename).parents]
        text = "".join([*traceback.format_list(own), *traceback.format_exception_only(error)])
        return cls(f"the evaluation of {what} raised an exception:\n{text.rstrip()}")


def scores_of(
    evaluate: Callable[[Any, str], Any], model: Any, task: str, what: str, metrics: Metrics
) -> dict[str, float]:
    """Return what a user's function finds, as `checked_scores`; `EvaluationError` if it raises."""
    try:
        returned = evaluate(model, task)
    except Exception as error:
        raise EvaluationError.raised(error, what) from error
    return checked_scores(returned, task, what, metrics)


def checked_scores(returned: Any, task: str, what: str, metrics: Metrics) -> dict[str, float]:
    """Return the scores of one model by metric; errors call it `what`.

    Refuse what is no finite number and no mapping to finite numbers, and other metrics than those
    of the task's first model, which `metrics` keeps from call to call.
    """
    if (found := _numbers(returned)) is None:
        raise EvaluationError(
            f"the evaluation of {what} returned {shown(returned)}; expected a finite number, or a "
            "mapping from metrics to finite numbers such as {'accuracy': 0.9}."
        )
    expected = metrics.setdefault(task, set(found))
    if expected != set(found):
        raise EvaluationError(
            f"the evaluation of {what} returned {', '.join(sorted(found))}; expected "
            f"{', '.join(sorted(expected))} as for the first model of this task."
        )
    return found


def _numbers(returned: Any) -> dict[str, float] | None:
    given = returned if isinstance(returned, Mapping) else {SCORE: returned}
    found = {}
    for metric, value in given.items():
        # Scalars of numpy and torch are numbers too; texts are not.
        if not isinstance(metric, str) or not hasattr(value, "__float__"):
            return None
        try:
            found[metric] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return None
    return found if found and all(map(math.isfinite, found.values())) else None


def _figure(width: float, height: float) -> Any:
    """Return an empty figure, without a window; `ImportError` says what to install."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # a broken installation raises anything
        advice = "the plot needs matplotlib; install it with pip install 'mergekit-ext[plots]'"
        raise ImportError(f"{advice} ({error})") from error
    return Figure(figsize=(width, height), layout="tight")


def _finish(axes: Any, across: str, up: str, path: Path) -> None:
    axes.set(xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    axes.figure.savefig(path, dpi=150)


def _heatmap(axes: Any, values: Any, rows: Sequence[Any], columns: Sequence[Any]) -> None:
    image, every = axes.imshow(values, aspect="auto"), -(-len(columns) // 12)  # a dozen labels
    axes.figure.colorbar(image, ax=axes, label="mean cosine of the task vectors")
    axes.set_xticks(range(0, len(columns), every), columns[::every], rotation=45)
    axes.set_yticks(range(len(rows)), rows)


@dataclass(frozen=True)
class SizePoint:
    """What one algorithm scored at one size."""

    algorithm: str
    requested: float  # the target size, in models
    size: float  # the size that was reached, in models
    bytes: int  # everything that is stored, masks and base included
    scores: Scores  # the higher, the better


def mean(scores: Scores, metric: str) -> float:
    """Return the mean of `metric` over the tasks that have it."""
    return fmean(of_task[metric] for of_task in scores.values() if metric in of_task)


def normalised(scores: Scores, reference: Scores, metric: str) -> tuple[float, ...] | None:
    """Return mean, least and most of scores over the individual models', of tasks with `metric`.

    None if a task's `reference` is not above zero: there is no ratio then.
    """
    pairs = [(of[metric], reference[task][metric]) for task, of in scores.items() if metric in of]
    if not all(whole > 0 for _, whole in pairs):
        return None
    ratios = [part / whole for part, whole in pairs]
    return fmean(ratios), min(ratios), max(ratios)


def write_curve_tables(folder: Path, points: Sequence[SizePoint], reference: Scores) -> None:
    """Write ``sizes.json`` and ``sizes.csv``: each point with its scores and their means."""
    keys = [(task, metric) for task, of_task in reference.items() for metric in of_task]
    metrics = dict.fromkeys(metric for _, metric in keys)
    rows: list[dict[str, Any]] = [
        {
            **vars(one),
            "mean": {metric: mean(one.scores, metric) for metric in metrics},
            "normalised": {m: (normalised(one.scores, reference, m) or [None])[0] for m in metrics},
        }
        for one in points
    ]
    content = {"format_version": CURVE_FORMAT, "reference": reference, "points": rows}
    text = json.dumps(content, indent=1, allow_nan=False)
    (folder / "sizes.json").write_text(text + "\n", encoding="utf-8")
    flat = [
        {
            **{key: row[key] for key in ("algorithm", "requested", "size", "bytes")},
            **{f"{task}/{metric}": row["scores"][task][metric] for task, metric in keys},
            **{f"{kind}/{m}": row[kind][m] for m in metrics for kind in ("mean", "normalised")},
        }
        for row in rows
    ]
    write_rows(folder / "sizes.csv", flat)


def plot(path: Path, points: Sequence[SizePoint], reference: Scores, metric: str) -> None:
    """Draw normalised means over sizes, one line for each algorithm (FlexMerge, figures 3 and 5).

    A band behind a line reaches from the lowest task to the highest. `ImportError` without
    matplotlib, `ValueError` if `metric` has no ratio.
    """
    axes, lines = _figure(6.0, 4.2).add_subplot(), dict[str, list[tuple[float, ...]]]()
    for point in points:
        if (found := normalised(point.scores, reference, metric)) is None:
            raise ValueError(f"{metric} of an individual model is not above zero")
        lines.setdefault(point.algorithm, []).append((point.size, *found))
    axes.axhline(1.0, linestyle="--", color="0.4", label="individual models")
    for algorithm, line in lines.items():
        sizes, heights, *band = zip(*sorted(line), strict=True)
        axes.plot(sizes, heights, marker="o", markersize=4, label=algorithm)
        axes.fill_between(sizes, *band, alpha=0.1)
    _finish(axes, "size (models)", f"normalised {metric}: mean, range of tasks", path)


def plot_trials(path: Path, scores: Sequence[float | None]) -> None:
    """Draw the score of each trial that has one, and the best so far."""
    axes = _figure(6.0, 4.2).add_subplot()
    numbers, heights = zip(*((i, s) for i, s in enumerate(scores, 1) if s is not None), strict=True)
    axes.plot(numbers, heights, "o", markersize=4, label="trial")
    axes.step(numbers, list(accumulate(heights, max)), where="post", label="best so far")
    _finish(axes, "trial", "mean score", path)


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def similarity_table(blocks: Rows) -> str:
    """Return one line a block."""
    lines = [f"{'block':<48} {'kind':<15} {'lowest':>7} {'mean':>7} {'highest':>7}"]
    line = "{block:<48} {kind:<15} {lowest:7.3f} {mean:7.3f} {highest:7.3f}"
    return "\n".join([*lines, *(line.format_map(block) for block in blocks)])


def steps_table(steps: Rows, rows: int = 12) -> str:
    """Return evenly spaced merges, the first and the last among them."""
    last = len(steps) - 1
    lines = [f"{'merges':>6} {'size':>8} {'bytes':>16} {'similarity':>10}  last merge"]
    for index in sorted({round(i * last / max(1, rows - 1)) for i in range(rows)}):
        step = steps[index]
        similarity = "" if step["similarity"] is None else f"{step['similarity']:.3f}"
        where = f"{step['block']}: {step['groups']}" if step["block"] else ""
        size = f"{in_models(step['models']):8.3f} {step['bytes']:16,}"
        lines.append(f"{step['merges']:6} {size} {similarity:>10}  {where}")
    return "\n".join(lines)


def plot_similarity(
    path: Path, tasks: Mapping[str, Sequence[float]], blocks: Rows, steps: Rows
) -> None:
    """Draw similarities, task by task and of kinds of blocks by depth; the size after each merge.

    Embeddings stand before the layers, what else lies outside of them behind.
    """
    picture, found = _figure(15.0, 4.2), dict[str, dict[Any, list[float]]]()
    left, middle, right = picture.subplots(1, 3)
    _heatmap(left, list(tasks.values()), list(tasks), list(tasks))
    places = ["in", *sorted({block["depth"] for block in blocks} - {None}), "out"]
    for block in blocks:
        outside = places[0 if block["kind"] == "embedding" else -1]
        place = outside if block["depth"] is None else block["depth"]
        found.setdefault(block["kind"], {}).setdefault(place, []).append(block["mean"])
    means = [[fmean(of.get(place, [math.nan])) for place in places] for of in found.values()]
    _heatmap(middle, means, list(found), places)
    middle.set(xlabel="layer")
    right.step([step["merges"] for step in steps], [step["models"] for step in steps], where="post")
    _finish(right, "merges", "size (models)", path)
