"""Any function (model, task) -> {metric: value}: in merges, in `sizes`, while training."""

from __future__ import annotations

import pytest
import torch
import yaml
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.callbacks import Evaluate
from mergekit_ext.report.tables import EvaluationError
from tests import models
from tests.callbacks.small import Net, llama, train

OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False)


def norm(model, task):
    assert not model.training and not torch.is_grad_enabled()
    return {"norm": model.get_parameter("model.norm.weight").norm(), "length": len(task)}


def test_the_output_of_a_merge_is_scored(tmp_path):
    _, tuned = models.family(tmp_path, llama, amounts=(0.1, 0.2))
    config = yaml.safe_dump(models.config("linear", tuned, parameters={"weight": 1.0}))
    evaluate = Evaluate(norm, tasks=("one", "three"))
    mergekit_ext.merge(config, tmp_path / "out", OPTIONS, callbacks=[evaluate])
    assert [(line["task"], line["scores"]["length"]) for line in evaluate.found] == [
        ("one", 3.0),
        ("three", 5.0),
    ]
    expected = models.state(tmp_path / "out")["model.norm.weight"].norm()
    assert evaluate.found[0]["scores"]["norm"] == pytest.approx(float(expected))
    assert evaluate.found[0]["where"] == str(tmp_path / "out")


def test_each_task_of_a_flexmerge_is_scored_with_its_own_model(tmp_path):
    base, tuned = models.family(tmp_path, llama, amounts=(0.1, 0.2))
    parameters = {"target_size": 2.0, "algorithm": "average"}
    config = yaml.safe_dump(models.config("flexmerge", tuned, base, parameters))
    evaluate = Evaluate(norm)
    mergekit_ext.merge(config, tmp_path / "out", OPTIONS, callbacks=[evaluate])
    assert [line["task"] for line in evaluate.found] == ["tuned0", "tuned1"]
    for line, folder in zip(evaluate.found, tuned, strict=True):
        own = models.state(folder)["model.norm.weight"].norm()
        assert line["scores"]["norm"] == pytest.approx(float(own), rel=1e-5)


def test_sizes_take_it(tmp_path):

    base, tuned = models.family(tmp_path, llama, amounts=(0.1, 0.2))
    content = models.config("flexmerge", tuned, base, {"algorithm": "average"})
    config = models.write_yaml(tmp_path / "flex.yml", content)
    seen = []
    evaluate = Evaluate(lambda model, task: seen.append(task) or {"accuracy": 0.5})
    mergekit_ext.sizes(config, tmp_path / "curve", OPTIONS, [1.0], (), evaluate, None, [])
    assert set(seen) == {"tuned0", "tuned1"}
    assert "accuracy" in (tmp_path / "curve/sizes.csv").read_text()


def test_models_are_scored_while_they_train():
    lines = []

    class Log:
        def log(self, values, step):
            lines.append((step, values))

    model = Net()
    model.train()
    model.norm.eval()
    evaluate = Evaluate(lambda model, task: {"f1": 1.0}, tasks=("a", "b"), every=2, log=Log())
    train(model, [evaluate], steps=5)
    evaluate.on_train_end(5, model)
    assert [line["where"] for line in evaluate.found[::2]] == ["step 2", "step 4", "step 5"]
    assert lines[0] == (2, {"a/f1": 1.0}) and lines[-1] == (5, {"b/f1": 1.0})
    assert model.training and not model.norm.training
    last = Evaluate(lambda model, task: 1.0, every=5)
    train(model, [last], steps=5)
    last.on_train_end(5, model)
    assert len(last.found) == 1
    other = Evaluate(lambda model, task: 1.0)
    other.load_state_dict(last.state_dict())
    assert other.found == last.found


def test_what_is_no_score_is_refused():
    model = Net()
    for bad in (None, "0.9", float("nan"), {}, {"a": "b"}, {1: 2.0}):
        with pytest.raises(EvaluationError, match=r"task x returned .*expected a finite number"):
            Evaluate(lambda model, task, bad=bad: bad)(model, "x")
    answers = iter([{"a": 1}, {"b": 1}])
    evaluate = Evaluate(lambda model, task: next(answers))
    evaluate(model, "x")
    with pytest.raises(EvaluationError, match="returned b; expected a as for the first model"):
        evaluate(model, "x")
    with pytest.raises(TypeError, match="function: found 3"):
        Evaluate(3)
    with pytest.raises(ValueError, match="tasks: found none"):
        Evaluate(norm, tasks=())
    with pytest.raises(ValueError, match="every: found 0"):
        Evaluate(norm, every=0)
