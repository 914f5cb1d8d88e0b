"""Tables, files and the plot of an analysis."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from mergekit_ext.report.tables import (
    plot_similarity,
    similarity_table,
    steps_table,
    write_rows,
)


def block(name: str, kind: str, depth: int | None, *cosines: float) -> dict[str, Any]:
    found = {"block": name, "kind": kind, "depth": depth, "elements": 40}
    return {**found, **dict(zip(("lowest", "mean", "highest"), cosines, strict=True)), "norm/a": 1}


def step(number: int) -> dict[str, Any]:
    found = {"merges": number, "models": 2 - number / 100, "bytes": 2000 - number}
    if number == 0:
        return {**found, "similarity": None, "block": "", "groups": ""}
    similarity = 1 / 3 - number / 100
    return {**found, "similarity": similarity, "block": f"block{number}", "groups": "a + b"}


BLOCKS = [
    block("embed", "embedding", None, -0.25, 0.0, 0.25),
    block("layers.0.attention", "attention", 0, 0.1, 0.2, 0.3),
    block("layers.0.norm1", "norm", 0, 0.4, 0.4, 0.4),
    block("layers.0.norm2", "norm", 0, 0.6, 0.6, 0.6),
    block("layers.1.attention", "attention", 1, 0.7, 0.8, 0.9),
]
STEPS = [step(number) for number in range(101)]


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


@pytest.mark.parametrize("rows", [BLOCKS, STEPS])
def test_rows_as_they_are_read(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, rows)
    assert b"\r" not in path.read_bytes()
    with path.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    # Every digit of a number; nothing where there is none.
    assert found == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ]


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
    assert list(sizes.get_ydata()) == [step["models"] for step in STEPS]


def test_a_plot_without_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = drawn(monkeypatch)
    plot_similarity(tmp_path / "x.png", BLOCKS[:1], STEPS[:1])
    assert not pictures[0].axes[0].get_lines()


def test_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_similarity(tmp_path / "x.svg", BLOCKS, STEPS)
    assert (tmp_path / "x.svg").read_bytes().startswith(b"<?xml")
