"""Tables, files and plots of an analysis and of an accuracy-size curve."""

from __future__ import annotations

import csv
import json
import math
import sys

import numpy
import pytest

from mergekit_ext.report.tables import (
    SizePoint,
    mean,
    normalised,
    plot,
    plot_similarity,
    similarity_table,
    steps_table,
    write_curve_tables,
    write_rows,
)

REFERENCE = {"a": {"accuracy": 0.8, "f1": 0.5}, "b": {"accuracy": 0.4}}


def point(algorithm="ties", size=1.0, a=0.4, b=0.4, f1=0.25):
    scores = {"a": {"accuracy": a, "f1": f1}, "b": {"accuracy": b}}
    return SizePoint(algorithm, size + 0.1, size, int(size * 1000), scores)


def test_means_are_over_the_tasks_that_have_the_metric():
    scores = point().scores
    assert mean(scores, "accuracy") == pytest.approx(0.4)
    assert mean(scores, "f1") == 0.25
    assert normalised(scores, REFERENCE, "accuracy") == pytest.approx((0.75, 0.5, 1.0))
    assert normalised(REFERENCE, REFERENCE, "f1") == (1.0, 1.0, 1.0)


def test_no_ratio_without_a_positive_reference():
    zero = {"a": {"accuracy": 0.0, "f1": 1.0}, "b": {"accuracy": 0.4}}
    assert normalised(point().scores, zero, "accuracy") is None
    assert normalised(point().scores, zero, "f1") == (0.25, 0.25, 0.25)


def test_csv(tmp_path):
    write_curve_tables(tmp_path, [point(), point("emr", 2.5, a=0.8)], REFERENCE)
    rows = list(csv.DictReader((tmp_path / "sizes.csv").open(encoding="utf-8")))
    assert list(rows[0]) == [
        *("algorithm", "requested", "size", "bytes", "a/accuracy", "a/f1", "b/accuracy"),
        *("mean/accuracy", "normalised/accuracy", "mean/f1", "normalised/f1"),
    ]
    assert [row["algorithm"] for row in rows] == ["ties", "emr"]
    second = {key: float(value) for key, value in rows[1].items() if key != "algorithm"}
    assert second["size"] == 2.5 and second["requested"] == 2.6 and second["bytes"] == 2500
    assert second["a/accuracy"] == 0.8 and second["mean/accuracy"] == pytest.approx(0.6)
    assert second["normalised/accuracy"] == 1.0 and second["normalised/f1"] == 0.5


def test_json_holds_everything(tmp_path):
    zero = {**REFERENCE, "b": {"accuracy": 0.0}}
    write_curve_tables(tmp_path, [point()], REFERENCE)
    path = tmp_path / "sizes.json"
    content = json.loads(path.read_text())
    assert content["format_version"] == 1 and content["reference"] == REFERENCE
    (first,) = content["points"]
    assert first["scores"] == point().scores
    assert first["mean"]["accuracy"] == pytest.approx(0.4)
    assert first["normalised"]["accuracy"] == pytest.approx(0.75)
    write_curve_tables(tmp_path, [point()], zero)
    assert json.loads(path.read_text())["points"][0]["normalised"]["accuracy"] is None


def block(name, kind, depth, *cosines):
    found = {"block": name, "kind": kind, "depth": depth, "elements": 40}
    return {**found, **dict(zip(("lowest", "mean", "highest"), cosines, strict=True)), "norm/a": 1}


def step(number):
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
    block("norm", "norm", None, 0.9, 0.9, 0.9),
]
TASKS = {"a": [math.nan, 0.5], "b": [0.5, math.nan]}
STEPS = [step(number) for number in range(101)]


def test_similarity_table():
    head, *lines = similarity_table(BLOCKS).splitlines()
    assert head.split() == ["block", "kind", "lowest", "mean", "highest"]
    assert lines[0].split() == ["embed", "embedding", "-0.250", "0.000", "0.250"]
    assert len(lines) == len(BLOCKS) and len({len(line) for line in (head, *lines)}) == 1


def test_steps_table_shows_the_ends_and_what_lies_between():
    head, *lines = steps_table(STEPS, rows=5).splitlines()
    assert head.split()[:4] == ["merges", "size", "bytes", "similarity"]
    assert [int(line.split()[0]) for line in lines] == [0, 25, 50, 75, 100]
    assert lines[0].split() == ["0", "2.000", "2,000"]
    assert lines[-1].split() == ["100", "1.000", "1,900", "-0.667", "block100:", "a", "+", "b"]


@pytest.mark.parametrize("count", [1, 2, 3, 11, 12, 13])
def test_few_steps_are_all_shown(count):
    lines = steps_table(STEPS[:count]).splitlines()[1:]
    assert len(lines) == min(count, 12)
    assert int(lines[-1].split()[0]) == count - 1


@pytest.mark.parametrize("rows", [BLOCKS, STEPS])
def test_rows_as_they_are_read(rows, tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, rows)
    assert b"\r" not in path.read_bytes()
    with path.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    # Every digit of a number; nothing where there is none.
    assert found == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figure = pytest.importorskip("matplotlib.figure")
    pictures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: pictures.append(self))
    return pictures


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_format_of_a_plot_is_that_of_its_name(tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    curve, similarity = tmp_path / f"sizes.{suffix}", tmp_path / f"similarity.{suffix}"
    plot(curve, [point(size=3), point(), point("emr", 2)], REFERENCE, "accuracy")
    plot_similarity(similarity, TASKS, BLOCKS, STEPS)
    assert curve.read_bytes().startswith(magic) and similarity.read_bytes().startswith(magic)


def test_the_lines_of_a_curve(tmp_path, drawn):
    points = [point(size=3, a=0.8), point(), point("emr", 2)]
    plot(tmp_path / "x.png", points, REFERENCE, "accuracy")
    (axes,) = drawn[0].axes
    whole, ties, emr = axes.get_lines()
    assert whole.get_linestyle() == "--" and list(whole.get_ydata()) == [1.0, 1.0]
    assert ties.get_label() == "ties" and list(ties.get_xdata()) == [1, 3]
    assert list(ties.get_ydata()) == pytest.approx([0.75, 1.0])
    lowest, highest = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (lowest, highest) == pytest.approx((0.5, 1.0))
    assert emr.get_label() == "emr" and len(emr.get_xdata()) == 1


def values_of(axes):
    (image,) = axes.images
    return image.get_array().filled(math.nan)


def labels_of(labels):
    return [label.get_text() for label in labels]


def test_the_pictures_of_similarities(tmp_path, drawn):
    plot_similarity(tmp_path / "x.png", TASKS, BLOCKS, STEPS)
    tasks, depths, sizes, *_ = drawn[0].axes
    numpy.testing.assert_array_equal(values_of(tasks), list(TASKS.values()))
    assert labels_of(tasks.get_xticklabels()) == labels_of(tasks.get_yticklabels()) == ["a", "b"]
    none = math.nan
    expected = [[0.0, none, none, none], [none, 0.2, 0.8, none], [none, 0.5, none, 0.9]]
    numpy.testing.assert_allclose(values_of(depths), expected)
    assert labels_of(depths.get_yticklabels()) == ["embedding", "attention", "norm"]
    assert labels_of(depths.get_xticklabels()) == ["in", "0", "1", "out"]
    (line,) = sizes.get_lines()
    assert list(line.get_ydata()) == [step["models"] for step in STEPS]


def test_many_layers_have_a_dozen_ticks(tmp_path, drawn):
    blocks = [block(f"layers.{i}.mlp", "mlp", i, 0, 0, 0) for i in range(80)]
    plot_similarity(tmp_path / "x.png", TASKS, blocks, STEPS)
    labels = labels_of(drawn[0].axes[1].get_xticklabels())
    assert labels[:3] == ["in", "6", "13"] and len(labels) <= 12


def test_plot_says_what_it_cannot_draw(tmp_path):
    pytest.importorskip("matplotlib")
    zero = {**REFERENCE, "b": {"accuracy": 0.0}}
    with pytest.raises(ValueError, match="not above zero"):
        plot(tmp_path / "x.png", [point()], zero, "accuracy")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mergekit-ext\[plots\]"):
        plot(tmp_path / "x.png", [point()], REFERENCE, "accuracy")
