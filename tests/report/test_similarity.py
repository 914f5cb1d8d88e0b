"""Tables, files and the plot of an analysis."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from mergekit_ext.report.similarity import (
    BlockSimilarity,
    Step,
    plot_similarity,
    similarity_table,
    steps_table,
    write_similarity,
    write_steps,
)

BLOCKS = [
    BlockSimilarity("embed", "embedding", None, 60, -0.25, 0.0, 0.25, (1.0, 2.0)),
    BlockSimilarity("layers.0.attention", "attention", 0, 40, 0.1, 0.2, 0.3, (1.0, 2.0)),
    BlockSimilarity("layers.0.norm1", "norm", 0, 4, 0.4, 0.4, 0.4, (0.0, 2.0)),
    BlockSimilarity("layers.0.norm2", "norm", 0, 4, 0.6, 0.6, 0.6, (1.0, 2.0)),
    BlockSimilarity("layers.1.attention", "attention", 1, 40, 0.7, 0.8, 0.9, (1.0, 2.0)),
]
STEPS = [
    Step(0, "", "", None, 2.0, 2000),
    *(Step(n, f"block{n}", "a + b", 1 / 3 - n / 100, 2 - n / 100, 2000 - n) for n in range(1, 101)),
]


def test_similarity_table() -> None:
    head, *lines = similarity_table(BLOCKS).splitlines()
    assert head.split() == ["block", "kind", "lowest", "mean", "highest"]
    assert lines[0].split() == ["embed", "embedding", "-0.250", "0.000", "0.250"]
    assert len(lines) == len(BLOCKS) and len({len(line) for line in (head, *lines)}) == 1


def test_steps_table_shows_the_ends_and_what_lies_between() -> None:
    head, *lines = steps_table(STEPS, rows=5).splitlines()
    assert head.split()[:4] == ["merges", "size", "bytes", "similarity"]
    assert [int(line.split()[0]) for line in lines] == [0, 25, 50, 75, 100]
    assert lines[0].split() == ["0", "2.000", "2,000"]
    assert lines[-1].split() == ["100", "1.000", "1,900", "-0.667", "block100:", "a", "+", "b"]


@pytest.mark.parametrize("count", [1, 2, 3, 11, 12, 13])
def test_few_steps_are_all_shown(count: int) -> None:
    lines = steps_table(STEPS[:count]).splitlines()[1:]
    assert len(lines) == min(count, 12)
    assert int(lines[-1].split()[0]) == count - 1


def rows(path: Path) -> list[dict[str, str]]:
    assert b"\r" not in path.read_bytes()
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_write_steps(tmp_path: Path) -> None:
    write_steps(tmp_path / "steps.csv", STEPS)
    found = rows(tmp_path / "steps.csv")
    assert len(found) == 101
    assert list(found[0]) == ["merges", "models", "bytes", "similarity", "block", "groups"]
    assert list(found[0].values()) == ["0", "2.0", "2000", "", "", ""]
    assert float(found[1]["similarity"]) == STEPS[1].similarity  # every digit
    assert found[100]["groups"] == "a + b"


def test_write_similarity(tmp_path: Path) -> None:
    write_similarity(tmp_path / "similarity.csv", BLOCKS, ["a", "b"])
    found = rows(tmp_path / "similarity.csv")
    assert list(found[0].items()) == [
        *(("block", "embed"), ("kind", "embedding"), ("depth", ""), ("elements", "60")),
        *(("lowest", "-0.25"), ("mean", "0.0"), ("highest", "0.25")),
        *(("norm/a", "1.0"), ("norm/b", "2.0")),
    ]
    assert [row["depth"] for row in found] == ["", "0", "0", "0", "1"]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    figure = pytest.importorskip("matplotlib.figure")
    pictures: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: pictures.append(self))
    return pictures


def test_the_lines_of_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = drawn(monkeypatch)
    plot_similarity(tmp_path / "x.png", BLOCKS, STEPS)
    left, right = pictures[0].axes
    attention, norm = left.get_lines()
    assert attention.get_label() == "attention" and list(attention.get_xdata()) == [0, 1]
    assert list(attention.get_ydata()) == [0.2, 0.8]
    assert norm.get_label() == "norm" and list(norm.get_ydata()) == [0.5]
    (sizes,) = right.get_lines()
    assert list(sizes.get_ydata()) == [step.models for step in STEPS]


def test_a_plot_without_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = drawn(monkeypatch)
    plot_similarity(tmp_path / "x.png", BLOCKS[:1], STEPS[:1])
    assert not pictures[0].axes[0].get_lines()


def test_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_similarity(tmp_path / "x.svg", BLOCKS, STEPS)
    assert (tmp_path / "x.svg").read_bytes().startswith(b"<?xml")
