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

from mergekit_ext.errors import MergekitExtError, shown

Scores = Mapping[str, Mapping[str, float]]
CURVE_FORMAT = 1
Rows = Sequence[Mapping[str, Any]]
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
    evaluate: Callable[[Any, str], Any],
    model: Any,
    task: str,
    what: str,
    metrics: dict[str, set[str]],
) -> dict[str, float]:
    """Return what a user's function finds, as `checked_scores`; `EvaluationError` if it raises."""
    try:
        returned = evaluate(model, task)
    except Exception as error:
        raise EvaluationError.raised(error, what) from error
    return checked_scores(returned, task, what, metrics)


def checked_scores(
    returned: Any, task: str, what: str, metrics: dict[str, set[str]]
) -> dict[str, float]:
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


def normalised_mean(scores: Scores, reference: Scores, metric: str) -> float | None:
    """Return the mean of scores divided by the individual models', over the tasks with `metric`.

    None if a task's `reference` is not above zero: there is no ratio then.
    """
    pairs = [(of[metric], reference[task][metric]) for task, of in scores.items() if metric in of]
    if not all(whole > 0 for _, whole in pairs):
        return None
    return fmean(part / whole for part, whole in pairs)


def write_curve_tables(folder: Path, points: Sequence[SizePoint], reference: Scores) -> None:
    """Write ``sizes.json`` and ``sizes.csv``: each point with its scores and their means."""
    keys = [(task, metric) for task, of_task in reference.items() for metric in of_task]
    metrics = dict.fromkeys(metric for _, metric in keys)
    rows: list[dict[str, Any]] = [
        {
            **vars(point),
            "mean": {metric: mean(point.scores, metric) for metric in metrics},
            "normalised": {m: normalised_mean(point.scores, reference, m) for m in metrics},
        }
        for point in points
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

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `metric` has no ratio.
    """
    picture = _figure(6.0, 4.2)
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        height = normalised_mean(point.scores, reference, metric)
        if height is None:
            raise ValueError(f"{metric} of an individual model is not above zero")
        lines.setdefault(point.algorithm, []).append((point.size, height))
    axes = picture.add_subplot()
    axes.axhline(1.0, linestyle="--", color="0.4", label="individual models")
    for algorithm, line in lines.items():
        sizes, heights = zip(*sorted(line), strict=True)
        axes.plot(sizes, heights, marker="o", markersize=4, label=algorithm)
    axes.set(xlabel="size (models)", ylabel=f"normalised {metric}")
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=150)


def plot_trials(path: Path, scores: Sequence[float | None]) -> None:
    """Draw the score of each trial that has one, and the best so far."""
    picture = _figure(6.0, 4.2)
    numbers, heights = zip(*((i, s) for i, s in enumerate(scores, 1) if s is not None), strict=True)
    axes = picture.add_subplot()
    axes.plot(numbers, heights, "o", markersize=4, label="trial")
    axes.step(numbers, list(accumulate(heights, max)), where="post", label="best so far")
    axes.set(xlabel="trial", ylabel="mean score")
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=150)


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
        size = f"{step['models']:8.3f} {step['bytes']:16,}"
        lines.append(f"{step['merges']:6} {size} {similarity:>10}  {where}")
    return "\n".join(lines)


def plot_similarity(path: Path, blocks: Rows, steps: Rows) -> None:
    """Draw similarity against depth, one line a kind; and the size after each merge."""
    picture = _figure(11.0, 4.2)
    left, right = picture.subplots(1, 2)
    lines: dict[str, dict[int, list[float]]] = {}
    for block in blocks:
        if block["depth"] is not None:
            means = lines.setdefault(block["kind"], {}).setdefault(block["depth"], [])
            means.append(block["mean"])
    for kind, line in lines.items():
        depths = sorted(line)
        left.plot(depths, [fmean(line[depth]) for depth in depths], marker="o", label=kind)
    left.set(xlabel="layer", ylabel="mean cosine of the task vectors")
    if lines:
        left.legend()
    right.step([step["merges"] for step in steps], [step["models"] for step in steps], where="post")
    right.set(xlabel="merges", ylabel="size (models)")
    picture.savefig(path, dpi=150)
