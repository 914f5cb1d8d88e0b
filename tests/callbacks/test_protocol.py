"""The protocol: what is documented, what is light, what is refused; logging."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_ext import callbacks
from mergekit_ext.callbacks import TRAINING_HOOKS, Callback, LogTo, as_trainer_callback
from mergekit_ext.events import (
    EVENTS,
    BlockMerged,
    Dispatcher,
    MergeBegin,
    MergeEnd,
    ProgressBar,
    SizeReached,
    StatisticsEnd,
    TensorMerged,
)
from tests.callbacks.small import llama

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mergekit_ext/callbacks"


def test_one_protocol_for_merges_and_training():
    for kind in EVENTS:
        assert callable(getattr(Callback, kind.handler))
    Dispatcher([Callback()])
    assert Callback().state_dict() == {}


def test_every_hook_is_documented_with_its_arguments():
    text = (ROOT / "docs/callbacks.md").read_text(encoding="utf-8")
    for hook in TRAINING_HOOKS:
        arguments = list(inspect.signature(getattr(Callback, hook)).parameters)[1:]
        assert f"| `{hook}({', '.join(arguments)})` |" in text


@pytest.mark.parametrize("name", ["MergeCheckpoints", "Evaluate", "LogTo"])
def test_every_argument_of_a_ready_callback_is_documented(name):
    text = (ROOT / "docs/callbacks.md").read_text(encoding="utf-8")
    section = text.split(f"`{name}`", 1)[1]
    for argument in list(inspect.signature(getattr(callbacks, name)).parameters):
        assert f"`{argument}`" in section or f"`{argument}=" in section, argument


def test_importing_everything_loads_no_library_of_models():
    modules = ", ".join(f"mergekit_ext.callbacks.{p.stem}" for p in PACKAGE.glob("[a-z]*.py"))
    code = (
        f"import sys, {modules}; "
        "heavy = {'mergekit', 'peft', 'transformers', 'accelerate'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_called_while_training_is_refused():
    with pytest.raises(TypeError, match=r"the class Callback; .* Callback\(\)"):
        as_trainer_callback(Callback)
    for other in (3, ProgressBar()):
        with pytest.raises(TypeError, match="expected some of the methods on_train_begin"):
            as_trainer_callback(other)

    class Only:
        def on_step_end(self, step, model): ...

    class Late(Only):
        def on_train_end(self, model): ...

    with pytest.raises(
        TypeError, match=r"Late.on_train_end .*; expected on_train_end\(step, model"
    ):
        as_trainer_callback(Late())

    assert as_trainer_callback(Only()).callback.__class__ is Only


class Target:
    def __init__(self):
        self.lines = []

    def log(self, values, step):
        self.lines.append((step, values))


MERGE = (
    MergeBegin("nan", "out", ("a", "b"), 2),
    StatisticsEnd({"model": {"a": 0.25, "b": 0.75}}, 0.1),
    TensorMerged("x", (2, 3), {"iterations": 4, "converged": True, "norms": {"a": 1.0}}, 0.5),
    TensorMerged("y", (2,), {"iterations": 6, "converged": False}, 0.1),
    SizeReached("ties", 1.5, 100),
    MergeEnd("out", 2.0),
)


def emit(listener, events=MERGE):
    dispatcher = Dispatcher([listener])
    for event in events:
        dispatcher.emit(event)
    dispatcher.close()


def test_a_merge_is_logged_tensor_by_tensor():
    target = Target()
    emit(LogTo(target))
    coefficients = {"merge/coefficient/model/a": 0.25, "merge/coefficient/model/b": 0.75}
    first = {"merge/iterations": 4.0, "merge/converged": 1.0, "merge/tensor_seconds": 0.5}
    second = {"merge/iterations": 6.0, "merge/converged": 0.0, "merge/tensor_seconds": 0.1}
    assert target.lines == [
        (0, coefficients),
        (1, first),
        (2, second),
        (2, {"merge/models": 1.5, "merge/bytes": 100}),
        (2, {"merge/units": 2, "merge/seconds": 2.0}),
    ]
    target.lines.clear()
    emit(LogTo(target, prefix="m."), (MERGE[0], BlockMerged("b", (("a",), ("b",)))))
    assert target.lines == [(1, {"m.groups": 2})]


def test_a_merge_while_training_is_logged_once_under_the_step_of_training():
    target = Target()
    log = LogTo(target, values=lambda step, model: {"norm": model}, every=2)
    for step in range(1, 4):
        log.on_step_end(step, 7.0)
    log.on_log(3, {"loss": 1.0})
    emit(log)
    log.on_step_end(4, 7.0)
    emit(log)
    *training, (step, merge), fourth, (last, _) = target.lines
    assert [*training, fourth] == [(2, {"norm": 7.0}), (3, {"loss": 1.0}), (4, {"norm": 7.0})]
    assert (step, last) == (3, 4)
    assert merge["merge/iterations"] == 5.0 and merge["merge/units"] == 2
    assert merge["merge/coefficient/model/a"] == 0.25


def test_merges_of_checkpoints_are_logged_under_the_step_of_training():
    target, scores = Target(), Target()
    merge = callbacks.MergeCheckpoints(
        "linear", every=2, callbacks=[LogTo(target)], log=scores, evaluate=lambda model, task: 1.0
    )
    model = llama()
    for step in range(1, 6):
        merge.on_step_end(step, model)
    merge.on_train_end(5, model)
    ((step, values),) = target.lines
    assert step == 5 and values["merge/units"] == len(model.state_dict())
    assert scores.lines == [(5, {"merged/score": 1.0, "last/score": 1.0})]


def test_log_goes_to_an_accelerator_and_its_trackers(tmp_path):
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "mine", False

        def __init__(self):
            super().__init__()
            self.lines = []

        @property
        def tracker(self):
            return self.lines

        def store_init_configuration(self, values): ...

        def log(self, values, step=None, **others):
            self.lines.append((step, values))

    mine = Tracker()
    accelerator = Accelerator(cpu=True, log_with=mine)
    accelerator.init_trackers("run")
    emit(LogTo(accelerator))
    assert len(mine.lines) == 5
    emit(LogTo(accelerator.get_tracker("mine")))
    emit(LogTo(LogTo(mine)))  # is a target itself
    assert len(mine.lines) == 15


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"target: found 3; expected some of the methods log"):
        LogTo(3)
    with pytest.raises(ValueError, match="every: found 0"):
        LogTo(Target(), every=0)
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = callbacks.Missing
    assert set(callbacks.__all__) <= set(dir(callbacks))
