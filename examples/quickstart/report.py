"""The table, as text, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model: accuracy per task, their mean, and their mean relative to the individual ones."""

    name: str
    kind: str  # "start", "finetuned", "individual" or "merged"
    accuracy: dict[str, float]
    mean: float
    normalised: float


def make_row(
    name: str, kind: str, accuracy: Mapping[str, float], individual: Mapping[str, float]
) -> Row:
    """``individual``: accuracy of each task's own fine-tuned model, which counts as 1."""
    mean = sum(accuracy.values()) / len(accuracy)
    normalised = sum(accuracy[t] / max(individual[t], 1e-9) for t in accuracy) / len(accuracy)
    return Row(name, kind, dict(accuracy), mean, normalised)


def table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """The rows as a Markdown table, which a terminal shows well too."""
    cells = [["model", *tasks, "mean", "normalised"]]
    for row in rows:
        scores = [*(row.accuracy[task] for task in tasks), row.mean, row.normalised]
        cells.append([row.name, *(f"{score:.3f}" for score in scores)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [_line(line, widths) for line in cells]
    rule = "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]])
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"


def write_json(path: Path, rows: Sequence[Row], details: Mapping[str, Any]) -> None:
    """All rows and the facts of the run."""
    document = {**details, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_plot(path: Path, rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Bars: the accuracy on each task, for the start, the individual and the merged models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    merged = [row for row in rows if row.kind == "merged"]
    start = next(row for row in rows if row.kind == "start")
    individual = next(row for row in rows if row.name == INDIVIDUAL)
    shown = [start, *merged, individual]
    figure, axes = plt.subplots(figsize=(1.6 + 1.9 * (len(tasks) + 1), 4.2))
    width = 0.85 / len(shown)
    groups = [*tasks, "mean"]
    colours = ["0.75", *plt.get_cmap("tab10").colors[: len(merged)], "0.25"]
    for i, (row, colour) in enumerate(zip(shown, colours, strict=False)):
        heights = [*(row.accuracy[task] for task in tasks), row.mean]
        places = [group + (i - (len(shown) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, heights, width, label=row.name, color=colour)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1)
    axes.set_ylabel("test accuracy")
    axes.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


INDIVIDUAL = "individual models"
