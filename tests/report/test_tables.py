from __future__ import annotations

import csv
import json
import sys

import pytest

from mergekit_ext.report.tables import (
    SizePoint,
    mean,
    normalised_mean,
    plot,
    write_curve_tables,
)

REFERENCE = {"a": {"accuracy": 0.8, "f1": 0.5}, "b": {"accuracy": 0.4}}


def point(algorithm="ties", size=1.0, a=0.4, b=0.4, f1=0.25):
    scores = {"a": {"accuracy": a, "f1": f1}, "b": {"accuracy": b}}
    return SizePoint(algorithm, size + 0.1, size, int(size * 1000), scores)


def test_means_are_over_the_tasks_that_have_the_metric():
    scores = point().scores
    assert mean(scores, "accuracy") == pytest.approx(0.4)
    assert mean(scores, "f1") == 0.25
    assert normalised_mean(scores, REFERENCE, "accuracy") == pytest.approx((0.5 + 1.0) / 2)
    assert normalised_mean(REFERENCE, REFERENCE, "f1") == 1.0


def test_no_ratio_without_a_positive_reference():
    zero = {"a": {"accuracy": 0.0, "f1": 1.0}, "b": {"accuracy": 0.4}}
    assert normalised_mean(point().scores, zero, "accuracy") is None
    assert normalised_mean(point().scores, zero, "f1") == 0.25


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


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"sizes.{suffix}"
    plot(path, [point(size=3), point(), point("emr", 2)], REFERENCE, "accuracy")
    assert path.read_bytes().startswith(magic)


def test_the_lines_of_the_plot(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    points = [point(size=3, a=0.8), point(), point("emr", 2)]
    plot(tmp_path / "x.png", points, REFERENCE, "accuracy")
    (axes,) = drawn[0].axes
    whole, ties, emr = axes.get_lines()
    assert whole.get_linestyle() == "--" and list(whole.get_ydata()) == [1.0, 1.0]
    assert ties.get_label() == "ties" and list(ties.get_xdata()) == [1, 3]
    assert list(ties.get_ydata()) == pytest.approx([0.75, 1.0])
    assert emr.get_label() == "emr" and len(emr.get_xdata()) == 1


def test_plot_says_what_it_cannot_draw(tmp_path):
    pytest.importorskip("matplotlib")
    zero = {**REFERENCE, "b": {"accuracy": 0.0}}
    with pytest.raises(ValueError, match="not above zero"):
        plot(tmp_path / "x.png", [point()], zero, "accuracy")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mergekit-ext\[plots\]"):
        plot(tmp_path / "x.png", [point()], REFERENCE, "accuracy")
