from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest

from mergekit_ext import events
from mergekit_ext.events import (
    Dispatcher,
    JsonLines,
    MergeBegin,
    MergeCallback,
    MergeEnd,
    ProgressBar,
    SolverIteration,
    StatisticsBegin,
    StatisticsEnd,
    TensorMeasured,
    TensorMerged,
)

RUN = (
    MergeBegin("nan", "out", ("a", "b"), 2),
    StatisticsBegin(2),
    TensorMeasured("x"),
    TensorMeasured("y"),
    StatisticsEnd({"model": {"a": 0.25, "b": 0.75}}, 0.1),
    SolverIteration("x", 1, 2.0, 0.5),
    TensorMerged("x", (2, 3), {"scale": 1.0}, 0.1),
    TensorMerged("y", (2,), {}, 0.1),
    MergeEnd("out", 1.0),
)


def test_every_event_has_a_method_of_the_protocol():
    kinds = [
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, events.Event) and kind is not events.Event
    ]
    assert set(kinds) == set(events.EVENTS)
    for kind in kinds:
        assert callable(getattr(MergeCallback, kind.handler))


def test_every_event_is_documented():
    text = (Path(__file__).parents[1] / "docs/callbacks.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:6] == "| `on_"]
    documented = {row[0].strip("`"): row[1:] for row in rows}
    for kind in events.EVENTS:
        fires, fields = documented[kind.handler]
        assert len(fires.split()) > 2
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in fields, f"{kind.__name__}.{field.name}"


def test_dispatch_reaches_whoever_has_the_method():
    class Some:
        def __init__(self):
            self.seen = []

        def on_tensor_merged(self, event):
            self.seen.append(event.name)

    some = Some()
    dispatcher = Dispatcher([some, MergeCallback()])
    for event in RUN:
        dispatcher.emit(event)
    dispatcher.close()
    assert some.seen == ["x", "y"]


def test_what_is_no_callback_is_refused():
    class Misspelt:
        def on_tensor_merge(self, event): ...

    with pytest.raises(TypeError, match=r"the class MergeCallback; .* MergeCallback\(\)"):
        Dispatcher([MergeCallback])
    for other in (3, object(), Misspelt(), print):
        with pytest.raises(TypeError, match="expected some of the methods on_merge_begin"):
            Dispatcher([other])


def test_a_method_that_cannot_take_its_event_is_refused_before_the_merge():
    class Late:
        def on_merge_begin(self, event, more=None): ...

        def on_merge_end(self): ...

    with pytest.raises(TypeError, match=r"found Late.on_merge_end .*expected on_merge_end\(event"):
        Dispatcher([Late()])
    Late.on_merge_end = print  # says nothing about its arguments that would exclude it
    Dispatcher([Late()])


def test_a_callback_can_stop_the_merge():
    class Stop(MergeCallback):
        def on_tensor_merged(self, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispatcher([Stop()]).emit(RUN[6])


def test_json_lines_to_a_path(tmp_path):
    path = tmp_path / "events.jsonl"
    lines = JsonLines(path)
    for event in RUN:
        Dispatcher([lines]).emit(event)
    lines.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["event"] for r in records] == [e.handler.removeprefix("on_") for e in RUN]
    assert records[4]["coefficients"] == {"model": {"a": 0.25, "b": 0.75}}
    assert records[0]["models"] == ["a", "b"]


def test_json_lines_to_an_open_file_leaves_it_open():
    file = io.StringIO()
    lines = JsonLines(file)
    Dispatcher([lines]).emit(RUN[-1])
    lines.close()
    assert json.loads(file.getvalue())["output"] == "out"


def test_progress_bar_counts_tensors():
    file = io.StringIO()
    dispatcher = Dispatcher([ProgressBar(file)])
    for event in RUN:
        dispatcher.emit(event)
    dispatcher.close()
    shown = file.getvalue()
    assert "Measuring" in shown
    assert "Merging (nan)" in shown
    assert "2/2" in shown


def test_progress_bar_advances_by_the_work():
    file = io.StringIO()
    bar = ProgressBar(file)
    bar.on_merge_begin(MergeBegin("lore", "out", ("a",), 3, work={"x": 8e15, "y": 0.0, "z": 2e15}))
    shown = []
    for name in "xyz":
        bar.on_tensor_merged(TensorMerged(name, (1,), {}, 0.0))
        bar._bar.refresh()
        shown.append(file.getvalue().rpartition("\r")[2])
    bar.close()
    assert [line.partition("%")[0][-3:] for line in shown] == [" 80", " 80", "100"]
    assert [line.partition("| ")[2][:11] for line in shown] == [f"{n}/3 tensors" for n in (1, 2, 3)]


def test_no_bar_where_nothing_is_left_to_measure():
    file = io.StringIO()
    dispatcher = Dispatcher([ProgressBar(file)])
    for event in (RUN[0], StatisticsBegin(0), StatisticsEnd({}, 0.0)):
        dispatcher.emit(event)
    dispatcher.close()
    assert "Measuring" not in file.getvalue()
