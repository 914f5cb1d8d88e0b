"""`tune`: what a search finds, how it goes on, and what it refuses before any merge."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.options import MergeOptions

pytest.importorskip("optuna")

import mergekit_ext
from mergekit_ext.declared import lore
from mergekit_ext.errors import ConfigError, MergeError
from mergekit_ext.host.flexmerge import engine
from mergekit_ext.report.tables import EvaluationError
from tests import models
from tests.cli import subcommand
from tests.host.test_merge_models import make

QUIET = MergeOptions(quiet=True, copy_tokenizer=False)
SCALE = {"scale": {"from": 0.0, "to": 2.0}}
NAME = "model.layers.0.self_attn.q_proj.weight"
# How far a merge went, as a share of one of the models: best at 0.2.
SCORES = """
import os, signal
from pathlib import Path
from safetensors import safe_open
from tests.host.test_tune import NAME

calls = killed_at = 0


def weight(name):
    with safe_open(Path(__file__).parent / name / "model.safetensors", "pt") as file:
        return file.get_tensor(NAME)


def evaluate(model, task):
    global calls
    calls += 1
    if calls == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    start = weight("base")
    gone = (model.get_parameter(NAME).detach() - start).norm() / (weight("tuned2") - start).norm()
    return {"near": 1 - abs(float(gone) - 0.2), "gone": float(gone)}
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("family")
    (folder / "scores_of_tune.py").write_text(SCORES)
    return models.family(folder, partial(make, tied=False))


@pytest.fixture
def evaluate(family: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(family[0].parent))
    import scores_of_tune

    return scores_of_tune.evaluate


def opened(family: Any, method: Any = "nan", **parameters: Any) -> dict[str, Any]:
    return models.config(method, family[1], family[0], parameters or SCALE)


def close(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(models.state(folder), tensors, atol=1e-6, rtol=1e-5)


def test_the_best_is_found_and_stock_mergekit_merges_it(family, evaluate, tmp_path):
    seen = {}

    def keep(model, task):
        found = evaluate(model, task)["near"]
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen.setdefault(found, tensors)
        return found

    found = mergekit_ext.tune(opened(family), tmp_path / "out", keep, QUIET, trials=16)
    assert found.score == pytest.approx(max(seen)) and found.score > 0.97
    assert len(found.trials) == 16 and len(seen) == 16
    done = models.command_here("mergekit-yaml", tmp_path / "out/best.yml", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    close(tmp_path / "merged", seen[max(seen)])
    names = {"best.yml", "study.log", ".study.lock", "tune.csv", "tune.json", "tune.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert yaml.safe_load((tmp_path / "out/best.yml").read_text()) == found.best
    table = json.loads((tmp_path / "out/tune.json").read_text())["trials"]
    assert table == list(found.trials)


def test_a_killed_search_goes_on_as_if_it_had_not_been_killed(family, evaluate, tmp_path):
    config = opened(family)
    whole = mergekit_ext.tune(config, tmp_path / "whole", evaluate, QUIET, trials=4, tasks=["a"])
    path = models.write_yaml(tmp_path / "open.yml", config)
    module = sys.modules["scores_of_tune"]
    if (child := os.fork()) == 0:
        try:
            module.calls, module.killed_at = 0, 3
            mergekit_ext.tune(path, tmp_path / "out", evaluate, QUIET, trials=4, tasks=["a"])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = json.loads((tmp_path / "out/tune.json").read_text())["trials"]
    assert len(before) == 2
    module.calls = 0
    found = mergekit_ext.tune(path, tmp_path / "out", evaluate, QUIET, trials=4, tasks=["a"])
    assert module.calls == 2
    for row, expected in zip(found.trials, whole.trials, strict=True):
        assert row.pop("state") == expected.pop("state") == "complete"
        assert row == pytest.approx(expected)


def test_lore_is_solved_for_two_factors_and_no_more(family, evaluate, tmp_path, monkeypatch):
    solved, solve = [], lore.kernel.lore
    count = lambda *given, **how: solved.append(how["lam"]) or solve(*given, **how)  # noqa: E731
    monkeypatch.setattr(lore.kernel, "lore", count)
    seen = {}

    def last(model, task):
        seen.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return evaluate(model, task)

    config = opened(family, "lore", **{"lambda": {"from": 0.1, "to": 1.0}, "mu_relative": 0.1})
    del config["base_model"]
    found = mergekit_ext.tune(config, tmp_path / "out", last, QUIET, trials=5, tasks=["a"])
    assert len(set(solved)) == 2
    exact = {**config, "parameters": {**found.best["parameters"]}}
    exact["parameters"]["lambda"] = found.trials[-1]["parameters.lambda"]
    mergekit_ext.merge(exact, tmp_path / "exact", QUIET)
    close(tmp_path / "exact", seen)


def test_each_method_has_its_own_parameters_and_failures_are_no_end(family, evaluate, tmp_path):
    both = {"density": {"choose": [0.2, 0.6]}, "weight": 1.0, "mu_relative": 0.1}
    config = opened(family, ["lore", "ties"], **both)

    def fails(model, task):
        if evaluate(model, task)["gone"] > 0.1:
            raise MergeError("too far")
        return 1.0

    with pytest.raises(EvaluationError, match="raised an exception"):
        mergekit_ext.tune(config, tmp_path / "raised", fails, QUIET, trials=3)
    found = mergekit_ext.tune(config, tmp_path / "out", evaluate, QUIET, trials=6)
    assert {row["merge_method"] for row in found.trials} == {"lore", "ties"}
    own = {"lore": {"mu_relative", "weight"}, "ties": {"density", "weight"}}
    assert found.best["parameters"].keys() == own[found.best["merge_method"]]


def test_sizes_of_a_flexmerge_are_those_of_one_analysis(family, tmp_path, monkeypatch):
    analyses, analyse = [], engine.analyse
    count = lambda *given: analyses.append(given) or analyse(*given)  # noqa: E731
    monkeypatch.setattr(engine, "analyse", count)
    seen = []

    def worse(model, task):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return -len(seen)

    config = opened(family, "flexmerge", target_size={"from": 1.0, "to": 3.0})
    found = mergekit_ext.tune(config, tmp_path / "out", worse, QUIET, trials=2)
    assert len(analyses) == 1
    tasks = [f"tuned{i}" for i in range(3)]
    assert {f"{task}/score" for task in tasks} <= found.trials[0].keys()
    merged = mergekit_ext.merge(found.best, options=QUIET).tensors
    for task, tensors in zip(tasks, seen, strict=False):
        torch.testing.assert_close(merged[task], tensors, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"granularity": {"from": 0, "to": 1}},
            "parameters.granularity: found 0.0; expected",
        ),
        ({"density": {"from": 0.1, "to": 2}}, "density: found a parameter that `nan` does not"),
        ({"scale": {"from": 2, "to": 1}}, "parameters.scale: found {'from': 2, 'to': 1}"),
        ({"scale": {"from": 0, "to": 1, "stpe": 1}}, "stpe"),
        ({"scale": {"from": 0}}, "KeyError: 'to'"),
        ({"scale": {"from": 0, "to": 1, "log": True}}, "log"),
        ({"scale": {"choose": []}}, "parameters.scale: found {'choose': []}"),
        ({"scale": {"from": 0, "to": 1e9}}, "parameters.scale: found 1000000000.0"),
        ({"scale": {"choose": [1, "much"]}}, "parameters.scale: found 'much'"),
        ({"scale": 1.0}, "found nothing open"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_refused_before_any_merge(family, evaluate, tmp_path, changes, message):
    with pytest.raises(ConfigError) as raised:
        mergekit_ext.tune(opened(family, **changes), tmp_path / "out", evaluate, QUIET)
    assert message in str(raised.value)
    assert len(raised.value.problems) == 1 and not (tmp_path / "out").exists()


def test_all_problems_are_one_error(family, evaluate, tmp_path):
    changes = {"scale": {"from": 2, "to": 1}, "granularity": {"choose": 3}}
    with pytest.raises(ConfigError, match="2 problems"):
        mergekit_ext.tune(opened(family, **changes), tmp_path / "out", evaluate, QUIET)


def test_optuna_is_an_extra(family, evaluate, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"mergekit-ext\[tune\]") as raised:
        given = {**opened(family), "dtype": "float3"}
        mergekit_ext.tune(given, tmp_path / "out", evaluate, QUIET)
    assert [problem.where for problem in raised.value.problems] == ["dtype", "optuna"]


def test_another_search_and_no_study(family, evaluate, tmp_path):
    mergekit_ext.tune(opened(family), tmp_path, evaluate, QUIET, trials=1, tasks=["a"])
    with pytest.raises(ConfigError, match=r"with this search; (.|\n)*Choose another folder"):
        mergekit_ext.tune(opened(family), tmp_path, evaluate, QUIET, trials=1, tasks=["b"])
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match=r"another output \(config.json\)"):
        mergekit_ext.tune(opened(family), tmp_path, evaluate, QUIET, trials=1, tasks=["a"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "study.log").write_text("no study\n" * 3)
    with pytest.raises(ConfigError, match="Choose another folder"):
        mergekit_ext.tune(opened(family), tmp_path, evaluate, QUIET, trials=1, tasks=["a"])


def test_functions_without_a_number(family, tmp_path):
    with pytest.raises(EvaluationError, match="expected a finite number"):
        mergekit_ext.tune(opened(family), tmp_path / "out", lambda *_: math.nan, QUIET)


def test_no_trial_that_succeeds(family, evaluate, tmp_path):
    # Finite numbers, and none of them in the range of the output's dtype.
    config = {**opened(family, scale={"from": 9e5, "to": 1e6}, weight=1e6), "out_dtype": "float16"}
    with pytest.raises(MergeError, match="none of 2 trials gave a model"):
        mergekit_ext.tune(config, tmp_path / "out", evaluate, QUIET, trials=2)


def test_the_command(family, evaluate, tmp_path):
    path = models.write_yaml(tmp_path / "open.yml", opened(family))
    given = ("--evaluate", "scores_of_tune:evaluate", "--trials", 2, "--task", "a")
    done = subcommand("tune", path, tmp_path / "out", *given)
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"{tmp_path / 'out' / 'best.yml'}\n") and "best=" in done.stderr
