"""The accuracy-size curve: what is evaluated, what is written, what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergekit.options import MergeOptions
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from mergekit_ext.errors import ConfigError
from mergekit_ext.events import MergeCallback, SizeReached, StatisticsBegin
from mergekit_ext.flexmerge.algorithm import Declared
from mergekit_ext.flexmerge.runtime import load
from mergekit_ext.host import run
from mergekit_ext.host.flexmerge.sizes import sizes as sizes_of
from mergekit_ext.report.tables import EvaluationError, checked_scores
from tests.models import config, family, write_yaml

OPTIONS = MergeOptions(quiet=True)
TASKS = ("tuned0", "tuned1", "tuned2")
SMALL = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def bert(labels: int = 2) -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(**SMALL, max_position_embeddings=8, num_labels=labels)
    )


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return family(tmp_path_factory.mktemp("llamas"), llama)


def written(
    folder: Path,
    inputs: tuple[Path, Sequence[Path]],
    parameters: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """A configuration without a target size."""
    base, models = inputs
    return write_yaml(
        folder / "merge.yml", config("flexmerge", models, base, parameters or {}, **keys)
    )


class Recorder:
    """An evaluation that remembers what it was called with."""

    def __init__(self, score: Callable[[int], Any] = lambda call: 0.5 + call / 1000):
        self.calls: list[tuple[str, bool, dict[str, torch.Tensor]]] = []
        self._score = score

    def __call__(self, model: PreTrainedModel, task: str) -> Any:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.calls.append((task, model.training, tensors))
        return self._score(len(self.calls) - 1)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sizes.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def points(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sizes.json").read_text())["points"]


def test_each_model_and_each_task_at_each_size_once(llamas: Any, tmp_path: Path) -> None:
    path, seen = written(tmp_path, llamas), Recorder()
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [1.0, 2.0, 3.0], (), seen)
    assert [task for task, _, _ in seen.calls] == [*TASKS] * 4
    assert not any(training for _, training, _ in seen.calls)
    assert curve.reference == {t: {"score": 0.5 + i / 1000} for i, t in enumerate(TASKS)}
    assert [point.requested for point in curve.points] == [3.0, 2.0, 1.0]
    for number, point in enumerate(curve.points, 1):
        assert point.size <= point.requested
        assert point.scores == {
            task: {"score": 0.5 + (3 * number + i) / 1000} for i, task in enumerate(TASKS)
        }
    # At full size models are the inputs.
    for (_, _, own), (_, _, found) in zip(seen.calls[:3], seen.calls[3:6], strict=True):
        assert all(torch.equal(own[name], found[name]) for name in own)


@pytest.mark.parametrize("algorithm", ["ties", "emr"])
def test_what_is_evaluated_is_what_a_merge_writes(tmp_path: Path, algorithm: str) -> None:
    base, models = inputs = family(tmp_path, llama, torch.bfloat16)
    keys = {"out_dtype": "float32"}  # not the dtype in the models' configurations
    path, seen = written(tmp_path, inputs, {"algorithm": algorithm}, **keys), Recorder()
    sizes_of(path, tmp_path / "out", OPTIONS, [2.5], (), seen)
    sized = config("flexmerge", models, base, {"target_size": 2.5, "algorithm": algorithm}, **keys)
    run.merge(str(write_yaml(tmp_path / "sized.yml", sized)), tmp_path / "merge", OPTIONS)
    for task, module in load(tmp_path / "merge").items():
        (found,) = [tensors for name, _, tensors in seen.calls[3:] if name == task]
        for name, tensor in module.state_dict().items():
            assert found[name].dtype == tensor.dtype == torch.float32
            assert torch.equal(found[name], tensor), name


def test_tables(llamas: Any, tmp_path: Path) -> None:
    path, out = written(tmp_path, llamas), tmp_path / "out"
    seen = Recorder(lambda call: {"accuracy": 0.5 if call < 3 else 0.25, "f1": 1})
    algorithms = ("average", "emr")
    sizes_of(path, out, OPTIONS, [1.0, 2.0, "all"], algorithms, seen)
    table = rows(out)
    assert len(table) == len(points(out))
    lines = {name: [row for row in table if row["algorithm"] == name] for name in algorithms}
    for line in lines.values():
        sizes = [float(row["size"]) for row in line]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == 3
        assert all(row["normalised/accuracy"] == "0.5" for row in line)
        assert all(row["mean/accuracy"] == "0.25" and row["tuned1/f1"] == "1.0" for row in line)
    # All sizes after merges of the average; EMR ends above 2, which then is there once.
    assert float(lines["average"][-1]["size"]) == 1
    smallest = float(lines["emr"][-1]["size"])
    assert 2 < smallest < 2.2 and smallest == float(lines["emr"][-1]["requested"])
    assert Counter(row["size"] for row in lines["emr"])[lines["emr"][-1]["size"]] == 1
    assert (out / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_reach_is_the_smallest_once(
    llamas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, seen = written(tmp_path, llamas, {"algorithm": "emr"}), Recorder()
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [1.0, 1.5], (), seen)
    (point,) = curve.points
    assert point.requested == 1.5 and 2 < point.size < 2.2 and len(seen.calls) == 6
    assert "emr: 1.5, 1 cannot be reached; the least is 2.09" in curve.notes[0]


def test_sizes_between_two_merges_are_evaluated_once(llamas: Any, tmp_path: Path) -> None:
    path, seen = written(tmp_path, llamas, {"granularity": "model"}), Recorder()
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [2.0, 2.25, 2.75], (), seen)
    assert [point.requested for point in curve.points] == [2.75, 2.25, 2.0]
    assert {point.size for point in curve.points} == {2.0}
    assert len(seen.calls) == 3 + 3
    assert curve.points[0].scores == curve.points[2].scores


def test_whole_numbers_only(
    llamas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, llamas)
    chosen = ("channel_merging",)
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [1.0, 1.5, 2.0], chosen)
    assert [point.size for point in curve.points] == [2.0, 1.0]
    assert "channel_merging: 1.5 left out; it has 3, 2, 1." in curve.notes
    with pytest.raises(ConfigError, match="a whole number of models"):
        sizes_of(path, tmp_path / "none", OPTIONS, [1.5], chosen)


@pytest.mark.parametrize("target", [{}, {"target_size": 0.1}])
def test_the_target_size_is_not_used(llamas: Any, tmp_path: Path, target: dict[str, float]) -> None:
    curve = sizes_of(written(tmp_path, llamas, target), tmp_path / "out", OPTIONS)
    assert [point.requested for point in curve.points] == [3.0, 2.0, 1.5, 1.0]


def test_without_an_evaluation_nothing_is_merged(
    llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Declared, "merge", lambda *arguments: pytest.fail("merged"))
    out = tmp_path / "out"
    curve = sizes_of(written(tmp_path, llamas), out, OPTIONS, ["all"])
    assert len(curve.points) > 10 and not (out / "sizes.png").exists()
    assert list(rows(out)[0]) == ["algorithm", "requested", "size", "bytes"]
    assert points(out)[0]["scores"] == {task: {} for task in TASKS}


def test_parameters_of_one_algorithm_do_not_keep_another_out(llamas: Any, tmp_path: Path) -> None:
    path = written(tmp_path, llamas, {"density": 0.3, "trim_scope": "block"})
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [1.0, 3.0], ("ties", "average", "ties"))
    assert [point.algorithm for point in curve.points] == ["ties", "ties", "average", "average"]
    with pytest.raises(ConfigError, match=r"parameters\.density"):
        sizes_of(path, tmp_path / "other", OPTIONS, [1.0], ("average", "tsv_m"))


def test_parameters_of_groups_do_not_keep_residuals_out(llamas: Any, tmp_path: Path) -> None:
    given = {"linkage": "average", "order": "random", "vectors": "shared", "dare_density": 0.5}
    path = written(tmp_path, llamas, {**given, "base": "given"})
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [2.0], ("average", "residual"))
    assert [point.algorithm for point in curve.points] == ["average", "residual"]


def test_all_sizes_are_those_that_bounded_ranks_allow(llamas: Any, tmp_path: Path) -> None:
    path = written(tmp_path, llamas, {"output": "adapters", "max_rank": 2})
    curve = sizes_of(path, tmp_path / "out", OPTIONS, ["all"], ["residual"])
    sizes = [point.size for point in curve.points]
    assert 1 < sizes[-1] < sizes[0] < 3 and sizes[0] == curve.points[0].requested


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"parameters": {"algoritm": "ties"}}, [1.0], "algorithm"),
        ({"parameters": {"algorithm": ["ties"]}}, [1.0], "algorithm"),
        ({"dytpe": "float32"}, [1.0], "dtype"),
        ({"models": []}, [1.0], "models"),
        ({}, [4.0, 3.5, 2.0], r"found 4, 3\.5; expected sizes from 1 to 3"),
    ],
    ids=str,
)
def test_what_is_refused_before_anything(
    llamas: Any, tmp_path: Path, changes: dict[str, Any], sizes: list[float], message: str
) -> None:
    base, models = llamas
    document = {**config("flexmerge", models, base, {}), **changes}
    path, seen = write_yaml(tmp_path / "merge.yml", document), Recorder()
    with pytest.raises(ConfigError, match=message):
        sizes_of(path, tmp_path / "out", OPTIONS, sizes, (), seen)
    assert not seen.calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", [[], "1.5", 2], ids=repr)
def test_what_is_no_list_of_sizes(llamas: Any, tmp_path: Path, sizes: Any) -> None:
    with pytest.raises(ConfigError, match="expected a list of sizes, one at least"):
        sizes_of(written(tmp_path, llamas), tmp_path / "out", OPTIONS, sizes)


def test_sizes_that_are_printed_are_held_and_another_curve_is_kept(
    llamas: Any, tmp_path: Path
) -> None:
    path, out = written(tmp_path, llamas), tmp_path / "out"
    curve = sizes_of(path, out, OPTIONS, ["all"], ("average", "residual"))
    printed = [float(line.split()[1]) for line in str(curve).splitlines()[1:]]
    again = sizes_of(path, tmp_path / "copied", OPTIONS, printed, ("average",))
    reached = {p.size: 0 for p in curve.points if p.algorithm == "average"}
    assert len(printed) == len(curve.points) > 4
    for number, point in zip(printed, curve.points, strict=True):
        assert point.size <= number + 1e-9 and number < point.size + 0.001
    assert {point.size for point in again.points} <= reached.keys()
    before = (out / "sizes.json").read_bytes()
    for number in (1, 2):
        later = sizes_of(path, out, OPTIONS, [1.0])
        assert f"sizes-{number}" in later.notes[-1] and len(points(out)) == 1
    assert (out / "sizes-1.json").read_bytes() == before
    assert (out / "sizes-2.csv").exists() and not again.notes


@pytest.mark.parametrize(
    "returned",
    [math.nan, math.inf, None, "0.9", {}, {"a": None}, {"a": math.nan}, {1: 0.5}, [0.5], 1j],
    ids=repr,
)
def test_what_is_no_score(returned: Any) -> None:
    with pytest.raises(EvaluationError, match=r"evaluation of it returned .*expected"):
        checked_scores(returned, "task", "it", {})


@pytest.mark.parametrize(
    "returned",
    [1, True, np.float32(1), np.int64(1), torch.tensor(1.0), {"score": np.array(1.0)}],
    ids=repr,
)
def test_scalars_of_all_kinds_are_scores(returned: Any) -> None:
    assert checked_scores(returned, "task", "it", {}) == {"score": 1.0}


def failing_at(call: int, then: Callable[[], Any]) -> Recorder:
    return Recorder(lambda number: 0.5 if number < call else then())


def test_no_score_of_an_input_leaves_nothing(llamas: Any, tmp_path: Path) -> None:
    seen = Recorder(lambda call: math.nan)
    with pytest.raises(EvaluationError, match=r"tuned0's individual model returned .*expected"):
        sizes_of(written(tmp_path, llamas), tmp_path / "out", OPTIONS, [1.0], (), seen)
    assert len(seen.calls) == 1 and not (tmp_path / "out").exists()


def test_an_exception_keeps_what_is_done(
    llamas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode() -> None:
        raise ZeroDivisionError("my own mistake")

    path, out, sizes = written(tmp_path, llamas), tmp_path / "out", [1.0, 2.0, 3.0]
    what = r"tuned1, `task_arithmetic` at size [12]\.?\d* raised"
    with pytest.raises(EvaluationError, match=what) as raised:
        sizes_of(path, out, OPTIONS, sizes, (), failing_at(7, explode))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert "ZeroDivisionError: my own mistake" in str(raised.value)
    assert "in explode" in str(raised.value)
    assert "mergekit_ext" not in str(raised.value)
    assert [row["requested"] for row in rows(out)] == ["3.0"] and len(points(out)) == 1
    assert "the first 1 sizes are in" in capsys.readouterr().err
    with pytest.raises(EvaluationError, match="returned f1; expected score as for the first"):
        sizes_of(path, out, OPTIONS, sizes, (), failing_at(9, lambda: {"f1": 1.0}))
    assert [row["requested"] for row in rows(out)] == ["3.0", "2.0"]


def test_tasks_may_have_metrics_of_their_own(
    llamas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(model: Any, task: str) -> dict[str, float]:
        return {"f1": 0.5} if task == "tuned1" else {"accuracy": 0.5, "f1": 0.25}

    out = tmp_path / "out"
    curve = sizes_of(written(tmp_path, llamas), out, OPTIONS, [1.0], (), evaluate, "f1")
    (row,) = rows(out)
    said = "".join(curve.notes)
    assert "accuracy: means are over tuned0, tuned2 alone" in said and "f1:" not in said
    assert "tuned1/accuracy" not in row and float(row["mean/f1"]) == pytest.approx(1 / 3)
    assert (out / "sizes.png").exists()


def test_an_unknown_metric_is_refused_before_the_sizes(llamas: Any, tmp_path: Path) -> None:
    seen = Recorder()
    with pytest.raises(ConfigError, match="found 'bleu'; expected one of score"):
        sizes_of(written(tmp_path, llamas), tmp_path / "out", OPTIONS, [1.0], (), seen, "bleu")
    assert len(seen.calls) == 3 and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--evaluate"):
        sizes_of(written(tmp_path, llamas), tmp_path / "out", OPTIONS, [1.0], metric="score")


def test_without_a_ratio_there_are_tables_and_no_plot(
    llamas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sizes.png").write_text("of an earlier run")
    zero = Recorder(lambda call: 0.0)
    curve = sizes_of(written(tmp_path, llamas), out, OPTIONS, [1.0], (), zero)
    assert rows(out)[0]["normalised/score"] == "" and not (out / "sizes.png").exists()
    assert "no plot: score of an individual model is not above zero" in curve.notes[-1]
    assert "mean score" in str(curve)


def test_a_folder_that_cannot_be_written(llamas: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen = Recorder()
    with pytest.raises(ConfigError, match="OUT_PATH"):
        sizes_of(written(tmp_path, llamas), tmp_path / "file" / "out", OPTIONS, [1.0], (), seen)
    with pytest.raises(ConfigError, match="where the input"):
        sizes_of(written(tmp_path, llamas), llamas[1][0], OPTIONS, [1.0], (), seen)
    assert not seen.calls


class Watch(MergeCallback):
    def __init__(self) -> None:
        self.sizes: list[SizeReached] = []
        self.passes = 0

    def on_size_reached(self, event: SizeReached) -> None:
        self.sizes.append(event)

    def on_statistics_begin(self, event: StatisticsBegin) -> None:
        self.passes += 1


def test_events_and_progress_and_one_analysis_for_all(
    llamas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, watch = written(tmp_path, llamas), tmp_path / "out", Watch()
    options, algorithms = MergeOptions(), ("average", "emr")
    curve = sizes_of(path, out, options, [1.0, 2.0], algorithms, Recorder(), None, [watch])
    assert watch.passes == 1
    assert watch.sizes == [SizeReached(p.algorithm, p.size, p.bytes) for p in curve.points]
    shown = capsys.readouterr().err
    assert "Individual models: 100%" in shown and "3/3" in shown
    assert "Evaluating: 100%" in shown and "9/9" in shown  # EMR has one size only
    curve = sizes_of(path, out, OPTIONS, [1.0, 3.0], algorithms, callbacks=[watch])
    assert watch.passes == 1 and curve.notes[0].startswith("emr: 1 cannot")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["ties", "emr"])
def test_private_heads(tmp_path: Path, algorithm: str) -> None:
    """Classifiers with 2, 3 and 4 labels."""
    base, tuned = family(tmp_path, bert)
    own = {}
    for labels, path in enumerate(tuned, 2):
        source, model = BertForSequenceClassification.from_pretrained(path), bert(labels)
        model.bert.load_state_dict(source.bert.state_dict())
        model.save_pretrained(path)
        own[path.name] = model

    def evaluate(model: Any, task: str) -> float:
        assert torch.equal(model.classifier.weight, own[task].classifier.weight)
        assert model.config.num_labels == own[task].config.num_labels
        assert model(torch.arange(8)[None]).logits.shape == (1, own[task].config.num_labels)
        return 1.0

    path = written(tmp_path, (base, tuned))
    curve = sizes_of(path, tmp_path / "out", OPTIONS, None, (algorithm,), evaluate)
    assert len(curve.points) >= 2
    # Heads lie outside of the number of models.
    assert curve.points[0].size == 3.0


def test_masks_over_a_base_of_a_wider_dtype_save_nothing(llamas: Any, tmp_path: Path) -> None:
    path = written(tmp_path, llamas, out_dtype="bfloat16")
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [1.0, 3.0, "all"], ("emr",))
    assert [(point.requested, point.size) for point in curve.points] == [(3.0, 3.0)]


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("algorithm", ["task_arithmetic", "emr"])
def test_few_and_many_models(tmp_path: Path, count: int, algorithm: str) -> None:
    inputs = family(tmp_path, llama, amounts=[0.01 * (i + 1) for i in range(count)])
    seen = Recorder()
    path = written(tmp_path, inputs)
    curve = sizes_of(path, tmp_path / "out", OPTIONS, [1.0, 2.0], (algorithm,), seen)
    sizes = [point.size for point in curve.points]
    if algorithm == "emr":
        # Masks do not save anything for two models; each of twelve costs a 32nd of a model.
        assert sizes == pytest.approx([2.0 if count == 2 else 2 + 12 / 32], rel=0.02)
    else:
        assert sizes[-1] == 1 and 1.5 < sizes[0] <= 2
    assert len(seen.calls) == count * (1 + len(sizes))


def test_a_stock_method_is_reached_under_its_name_in_yaml(llamas: Any, tmp_path: Path) -> None:
    path, watch = written(tmp_path, llamas, {"weight": 1}), Watch()
    sizes_of(path, tmp_path / "out", OPTIONS, [1.0], ["mergekit:ties"], Recorder(), None, [watch])
    assert [size.algorithm for size in watch.sizes] == ["mergekit:ties"]
