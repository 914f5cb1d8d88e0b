"""How alike the task vectors are, block by block, and what merging makes of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_ext.report.curve import figure


@dataclass(frozen=True)
class BlockSimilarity:
    """Cosines between the task vectors of one block, over all pairs of tasks.

    Attributes:
        depth: the layer, None outside of the layers.
        elements: parameters of the block.
        norms: of each task's vector.
    """

    name: str
    kind: str
    depth: int | None
    elements: int
    lowest: float
    mean: float
    highest: float
    norms: Sequence[float]


@dataclass(frozen=True)
class Step:
    """The size after one merge.

    Attributes:
        number: 0 is before the first merge.
        block: where it happened; empty for 0.
        groups: the two groups that became one, as text.
        models: the size in models; `bytes` in bytes.
    """

    number: int
    block: str
    groups: str
    similarity: float | None
    models: float
    bytes: int


def similarity_table(blocks: Sequence[BlockSimilarity]) -> str:
    """One line a block."""
    lines = [f"{'block':<48} {'kind':<15} {'lowest':>7} {'mean':>7} {'highest':>7}"]
    lines += [
        f"{b.name:<48} {b.kind:<15} {b.lowest:7.3f} {b.mean:7.3f} {b.highest:7.3f}" for b in blocks
    ]
    return "\n".join(lines)


def steps_table(steps: Sequence[Step], rows: int = 12) -> str:
    """Evenly spaced merges, the first and the last among them."""
    last = len(steps) - 1
    chosen = sorted({round(i * last / max(1, rows - 1)) for i in range(rows)})
    lines = [f"{'merges':>6} {'size':>8} {'bytes':>16} {'similarity':>10}  last merge"]
    for step in (steps[i] for i in chosen):
        similarity = "" if step.similarity is None else f"{step.similarity:.3f}"
        where = f"{step.block}: {step.groups}" if step.block else ""
        lines.append(
            f"{step.number:6} {step.models:8.3f} {step.bytes:16,} {similarity:>10}  {where}"
        )
    return "\n".join(lines)


def write_similarity(path: Path, blocks: Sequence[BlockSimilarity], tasks: Sequence[str]) -> None:
    """Every block as a row of a CSV file, with the norm of each task's vector."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = ["block", "kind", "depth", "elements", "lowest", "mean", "highest"]
        writer.writerow([*head, *(f"norm/{task}" for task in tasks)])
        for block in blocks:
            depth = "" if block.depth is None else block.depth
            found = [block.lowest, block.mean, block.highest, *block.norms]
            writer.writerow([block.name, block.kind, depth, block.elements, *found])


def write_steps(path: Path, steps: Sequence[Step]) -> None:
    """Every merge as a row of a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["merges", "models", "bytes", "similarity", "block", "groups"])
        for step in steps:
            similarity = "" if step.similarity is None else repr(step.similarity)
            writer.writerow(
                [step.number, step.models, step.bytes, similarity, step.block, step.groups]
            )


def plot_similarity(path: Path, blocks: Sequence[BlockSimilarity], steps: Sequence[Step]) -> None:
    """Similarity against depth, one line a kind; and the size after each merge.

    Raises:
        ImportError: matplotlib is not installed.
    """
    picture = figure(11.0, 4.2)
    left, right = picture.subplots(1, 2)
    for kind in dict.fromkeys(b.kind for b in blocks if b.depth is not None):
        chosen = [b for b in blocks if b.kind == kind and b.depth is not None]
        depths = sorted({b.depth for b in chosen if b.depth is not None})
        means = [_mean([b.mean for b in chosen if b.depth == depth]) for depth in depths]
        left.plot(depths, means, marker="o", label=kind)
    left.set(xlabel="layer", ylabel="mean cosine of the task vectors")
    if left.get_legend_handles_labels()[0]:
        left.legend()
    right.step([step.number for step in steps], [step.models for step in steps], where="post")
    right.set(xlabel="merges", ylabel="size (models)")
    picture.savefig(path, dpi=150)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
