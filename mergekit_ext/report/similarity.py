"""How alike the task vectors are, block by block, and what merging makes of it.

Rows are those of the files, by column. Of a block: ``block``, ``kind``, ``depth`` (None outside of
the layers), ``elements``; ``lowest``, ``mean`` and ``highest`` cosine of two tasks' vectors, and
the norm of each. Of a merge: ``merges`` (0 before the first); ``models`` and ``bytes`` after it;
``similarity``, ``block``, and ``groups``, the two that became one.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mergekit_ext.report.curve import figure

Rows = Sequence[Mapping[str, Any]]


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
    """Draw similarity against depth, one line a kind; and the size after each merge.

    Raises:
        ImportError: matplotlib is not installed.
    """
    picture = figure(11.0, 4.2)
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
