"""The training examples in their short form, and the evaluation with lm-eval."""

from __future__ import annotations

import builtins
import sys
import types

import pytest

pytest.importorskip("sklearn")

ROWS = ["last checkpoint", "mean of the last 3", "lore of the last 3"]


@pytest.mark.parametrize("example", ["plain", "trainer"])
def test_an_example_trains_merges_and_prints_its_table(example, capsys, monkeypatch):
    import importlib

    module = importlib.import_module(f"examples.training.{example}")
    monkeypatch.setattr(sys, "argv", [example, "--quick"])
    module.main()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| " in line]
    found = {row[0].strip("| "): float(row[1]) for row in table[2:]}
    assert list(found) == ROWS
    assert found["last checkpoint"] > 0.15  # of ten classes, after a few steps
    assert all(0 <= accuracy <= 1 for accuracy in found.values())


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch):
    from examples.training.harness import lm_eval_function

    stock = builtins.__import__

    def without(name, *rest):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return stock(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'mergekit-ext\[eval\]'"):
        lm_eval_function("some/tokenizer")


class Harness:
    """lm-eval, as far as the example uses it."""

    def __init__(self, monkeypatch):
        self.asked, self.results = {}, {}
        package, models = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models")
        huggingface = types.ModuleType("lm_eval.models.huggingface")
        tasks = types.ModuleType("lm_eval.tasks")
        package.simple_evaluate, huggingface.HFLM, tasks.TaskManager = self.evaluate, dict, dict
        for module in (package, models, huggingface, tasks):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def evaluate(self, model, tasks, limit, task_manager):
        self.asked = {"model": model, "tasks": tasks, "limit": limit, **task_manager}
        return {"results": self.results}


def test_what_lm_eval_returns_becomes_scores(monkeypatch):
    from examples.training.harness import lm_eval_function
    from mergekit_ext.callbacks import Evaluate
    from tests.callbacks.small import Net

    harness, model = Harness(monkeypatch), Net()
    metrics = {"alias": "arc", "sample_len": 9, "acc,none": 0.25, "acc_stderr,none": 0.1}
    harness.results = {"arc": {**metrics, "em,strict": 1}}
    evaluate = Evaluate(lm_eval_function("tokenizer", limit=10))
    assert evaluate(model, "arc") == {"acc": 0.25, "em,strict": 1.0}
    asked = {"pretrained": model, "tokenizer": "tokenizer", "batch_size": 8}
    assert harness.asked == {"model": asked, "tasks": ["arc"], "limit": 10, "include_path": None}


def test_lm_eval_of_a_flexmerge_with_local_tasks(monkeypatch):
    from examples.training.harness import lm_eval_function
    from tests.callbacks.small import Net

    harness = Harness(monkeypatch)
    evaluate = lm_eval_function("t", tasks={"law": "my_law"}, include_path="evals")
    harness.results = {"my_law": {"acc,none": 0.5}}
    assert evaluate(Net(), "law") == {"acc": 0.5}
    assert harness.asked["tasks"] == ["my_law"] and harness.asked["include_path"] == "evals"
    # A tag stands for several tasks.
    harness.results = {"one": {"acc,none": 0.5}, "two": {"acc,none": 0.75}}
    assert evaluate(Net(), "tag") == {"one/acc": 0.5, "two/acc": 0.75}
