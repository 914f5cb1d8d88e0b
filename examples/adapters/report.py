"""The results, as tables, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model of one study.

    Attributes:
        kind: "base", "individual", "merged", or "peft" for PEFT's own merge.
        seconds: of the merge, without starting; peft-merge reads and writes files in them. None
            where nothing was merged.
    """

    study: str
    name: str
    kind: str
    scores: dict[str, float]
    mean: float
    seconds: float | None = None


def table(rows: Sequence[Row]) -> str:
    """The rows of one study as a Markdown table, which a terminal shows well too."""
    cells = [["model", *rows[0].scores, "mean", "seconds"]]
    for row in rows:
        numbers = [*row.scores.values(), row.mean]
        time = "" if row.seconds is None else f"{row.seconds:.2f}"
        cells.append([row.name, *(f"{number:.3f}" for number in numbers), time])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    rule = "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]])
    lines = [_line(line, widths) for line in cells]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([cells[0].ljust(widths[0]), *rest]) + " |"


def write_json(path: Path, rows: Sequence[Row], details: Mapping[str, Any]) -> None:
    """All rows and the facts of the run."""
    document = {**details, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_plot(path: Path, groups: Mapping[str, tuple[str, Sequence[Row]]]) -> None:
    """Bars of the mean score, one panel for each study.

    Args:
        groups: by study what is scored, and its rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"base": "0.75", "individual": "0.25", "merged": "C0", "peft": "C1"}
    figure, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.4), squeeze=False)
    for panel, (study, (measure, rows)) in zip(axes[0], groups.items(), strict=True):
        places = range(len(rows), 0, -1)
        bars = panel.barh(
            places, [row.mean for row in rows], color=[colours[row.kind] for row in rows]
        )
        panel.bar_label(bars, fmt="%.3f", fontsize="small", padding=2)
        panel.set_yticks(places, [row.name for row in rows], fontsize="small")
        better = "less" if measure == "perplexity" else "more"
        panel.set_title(study)
        panel.set_xlabel(f"mean {measure} on test data ({better} is better)")
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
