"""`peft_merge.tune`: what is scored is what its best.yml gives, and the base stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("optuna")

import peft_merge
from mergekit_ext.errors import ConfigError
from mergekit_ext.report.tables import EvaluationError
from peft_merge.io import read
from tests.models import command_here, write_yaml
from tests.peft_merge.models import KINDS, Kind, answer, base, reloaded, saved

NAMES = ("code", "maths", "chat")
SCORES = """
from tests.peft_merge.models import KINDS, answer, base


def plain():
    return base(KINDS["plain"])


def evaluate(model, task):
    return {"size": float(answer(KINDS["plain"], model).norm()), "one": 1.0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(kind: Kind, method: Any, **keys: Any) -> dict[str, Any]:
    """A configuration of adapters that are saved in the current directory."""
    for seed, name in enumerate(NAMES):
        saved(kind, Path(name), seed)
    return {"merge_method": method, "models": [{"model": name} for name in NAMES], **keys}


@pytest.mark.parametrize("name", ["bias_lora_only", "replicated", "ia3"])
def test_what_is_scored_is_what_the_best_gives(name: str, folder: Path) -> None:
    kind, seen = KINDS[name], {}
    model = base(kind)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def evaluate(adapted: Any, task: str) -> float:
        assert not adapted.training and task == "all"
        found = answer(kind, adapted)
        return seen.setdefault(-float(found.norm()), found) is None or -float(found.norm())

    config = opened(kind, "nan", parameters={"scale": {"from": 0.1, "to": 2.0}})
    found = peft_merge.tune(config, "out", evaluate, model, trials=2, tasks=["all"], quiet=True)
    assert found.score == max(seen) and len(seen) == 2
    peft_merge.run_config("out/best.yml", "merged")
    assert torch.equal(answer(kind, reloaded(kind, Path("merged"))), seen[found.score])
    assert found.best == yaml.safe_load(Path("out/best.yml").read_text())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(answer(kind, model), answer(kind, base(kind)))


def test_everything_may_be_open_and_adapters_are_opened_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS["plain"]
    config = opened(
        kind,
        ["ties", "lore", "nan"],
        parameters={
            "density": {"choose": [0.2, 0.6]},
            "lambda": {"from": 0.1, "to": 2, "log": True},
            "mu_relative": {"choose": [0.05, 0.1]},
            "scale": {"from": 0.1, "to": 2},
        },
        rank={"from": 2, "to": 8, "step": 1},
    )
    config["models"][0]["parameters"] = {"weight": {"from": 0.5, "to": 1.5}}
    calls: list[Any] = []

    def evaluate(adapted: Any, task: str) -> float:
        if not calls:
            monkeypatch.setattr(read, "_configuration", None)
        calls.append(task)
        return 1.0

    found = peft_merge.tune(config, "out", evaluate, lambda: base(kind), trials=4, quiet=True)
    assert calls == [*NAMES] * 4
    row = found.trials[0]
    assert {"merge_method", "rank", "models[0].parameters.weight"} <= row.keys()
    own = {"ties": {"density", "lambda"}, "lore": {"mu_relative", "lambda"}, "nan": {"scale"}}
    assert found.best["parameters"].keys() == own[found.best["merge_method"]]


def test_tasks_of_a_flexmerge_have_their_own_adapters(folder: Path) -> None:
    kind, seen = KINDS["plain"], []
    size = {"target_size": {"from": 1.5, "to": 2.5}}

    def evaluate(adapted: Any, task: str) -> float:
        seen.append((task, answer(kind, adapted)))
        return 1.0

    config = opened(kind, "flexmerge", parameters=size)
    found = peft_merge.tune(config, "out", evaluate, base(kind), trials=1, quiet=True)
    peft_merge.run_config(found.best, "merged")
    assert [task for task, _ in seen] == [*NAMES]
    for task, expected in seen:
        assert torch.equal(answer(kind, reloaded(kind, Path("merged") / task)), expected)


@pytest.mark.parametrize(
    ("keys", "other", "messages"),
    [
        ({"rank": {"from": 0, "to": 8, "step": 1}}, "plain", ["rank: found 0; expected a whole"]),
        (
            {"parameters": {"scal": {"from": 1, "to": 2}, "weight": "much"}},
            "plain",
            ["2 problems", "scal: found a parameter", "weight: found 'much'"],
        ),
        ({"rank": {"choose": [2, 4]}}, "lora_bias", ["base_model: found a model", "q_proj"]),
    ],
    ids=["range", "parameters", "base"],
)
def test_what_is_refused_before_any_merge(
    keys: dict[str, Any], other: str, messages: list[str], folder: Path
) -> None:
    config = opened(KINDS["plain"], "nan", **keys)
    with pytest.raises(ConfigError) as raised:
        peft_merge.tune(config, "out", lambda *_: 1.0, base(KINDS[other]), quiet=True)
    assert all(message in str(raised.value) for message in messages), str(raised.value)
    assert not Path("out").exists()


def test_the_command(folder: Path) -> None:
    Path("scores_of_adapters.py").write_text(SCORES)
    config = opened(KINDS["plain"], "linear", parameters={"weight": {"from": 0.1, "to": 2.0}})
    path = write_yaml(Path("open.yml"), config)
    given = ("--evaluate", "scores_of_adapters:evaluate", "--trials", 2, "--task", "a")
    done = command_here("peft-merge", "tune", path, "out", *given, "--model", "scores_of_adapters")
    assert done.returncode == 2 and "--model: found scores_of_adapters" in done.stderr
    given = (*given, "--model", "scores_of_adapters:plain")
    done = command_here("peft-merge", "tune", path, "out", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("out/best.yml\n") and "best=" in done.stderr
    assert command_here("peft-merge", "out/best.yml", "merged").returncode == 0


def test_an_evaluation_that_raises_is_said_with_its_own_lines(folder: Path) -> None:
    def evaluate(adapted: Any, task: str) -> float:
        raise KeyError("no labels")

    config = opened(KINDS["plain"], "nan", parameters={"scale": {"from": 0.1, "to": 2.0}})
    with pytest.raises(EvaluationError, match=r"code in a trial raised .*:(?s:.)*no labels"):
        peft_merge.tune(config, "out", evaluate, base(KINDS["plain"]), trials=1, quiet=True)
