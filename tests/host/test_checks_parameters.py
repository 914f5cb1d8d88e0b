"""Parameters and numbers of models that a method does not take, with place and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from mergekit import merge_methods
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
)

from mergekit_ext.errors import Problem
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.methods import Inputs
from tests.host.small import LINEAR, at, entries, run, the


def test_unknown_method_names_the_nearest(models: Path) -> None:
    report = run({**LINEAR, "merge_method": "task_arithmatic", "models": entries(models, "a")})
    assert the(report).where == "merge_method"
    assert the(report).remedy == "Write `task_arithmetic`."


def test_unknown_misplaced_and_invalid_parameters(models: Path) -> None:
    report = run(
        {
            "merge_method": "ties",
            "base_model": str(models / "base"),
            "models": [
                *entries(models, "a", weigth=1, weight=1, normalize=True),
                *entries(models, "b", weight=["0.1", "x"], density=[]),
            ],
            "parameters": {"lamda": 1, "int8_mask": [{"filter": "mlp", "value": "maybe"}]},
        }
    )
    assert at(report, "models[0].parameters.weigth").remedy == "Write `weight`."
    assert at(report, "parameters.lamda").remedy == "Write `lambda`."
    assert "Move `normalize:`" in at(report, "models[0].parameters.normalize").remedy
    assert "valid number" in at(report, "models[1].parameters.weight[1]").expected
    assert at(report, "models[1].parameters.density").found == "an empty list"
    assert "boolean" in at(report, "parameters.int8_mask[0].value").expected
    assert len(report.problems) == 6


def test_required_parameter_missing_for_one_model(models: Path) -> None:
    report = run(
        {
            "merge_method": "linear",
            "models": [*entries(models, "a", weight=1), *entries(models, "b")],
        }
    )
    assert the(report).where == "models[1].parameters.weight"
    assert str(models / "b") in the(report).expected
    assert "Add `weight:`" in the(report).remedy


def test_base_of_a_method_without_base_is_one_more_input(models: Path) -> None:
    report = run(
        {
            "merge_method": "linear",
            "base_model": str(models / "base"),
            "models": entries(models, "a", "b", weight=1),
        }
    )
    assert the(report).where == "base_model"
    assert "remove `base_model:`" in the(report).remedy


def test_missing_shared_parameter(models: Path) -> None:
    report = run(
        {
            "merge_method": "slerp",
            "base_model": str(models / "a"),
            "models": entries(models, "a", "b"),
        }
    )
    assert the(report).where == "parameters.t"


def test_filter_that_leaves_tensors_without_a_value(models: Path) -> None:
    report = run(
        {
            "merge_method": "linear",
            "models": [
                *entries(models, "a", weight=[{"filter": "self_attn", "value": 1}]),
                *entries(models, "b", weight=1),
            ],
        }
    )
    problem = the(report)
    assert problem.found == "no value in models[0].parameters.weight"
    assert "13 tensors" in problem.where and "model.embed_tokens.weight" in problem.where
    assert "without `filter:`" in problem.remedy


def test_filter_that_matches_nothing_is_a_note(models: Path) -> None:
    weight = [{"filter": "attention.wq", "value": 1}, {"value": 2}]
    document = {
        "merge_method": "linear",
        "models": entries(models, "a", "b"),
        "parameters": {"weight": weight},
    }
    report = run(document)
    assert report.problems == ()
    assert any("'attention.wq' matches no tensor" in note for note in report.notes)


def test_gradient_whose_middle_is_invalid(models: Path) -> None:
    report = run(
        {
            "merge_method": "karcher",
            "models": entries(models, "deep"),
            "parameters": {"max_iter": [1, 5]},
        }
    )
    problem = at(report, "parameters.max_iter")
    assert "between the values of a gradient" in problem.found
    assert "integer" in problem.expected


def test_parameter_of_the_base_is_a_note(models: Path) -> None:
    report = run(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(models / "base"),
            "models": entries(models, "base", "a", weight=1),
        }
    )
    assert report.problems == ()
    assert any("models[0].parameters.weight has no effect" in note for note in report.notes)


def test_parameters_that_are_wrong_together(models: Path) -> None:
    document = {
        "merge_method": "nan_della",
        "base_model": str(models / "base"),
        "models": [
            *entries(models, "a", density=0.9),
            *entries(models, "b", density=[0.5, 0.1], epsilon=0.2),
            *entries(models, "c", density=0.5),
        ],
    }
    report = run(document)
    assert [problem.where for problem in report.problems] == [
        "parameters.epsilon",
        "models[1].parameters.epsilon",
    ]
    assert report.problems[0].found == "0.15 with a density of 0.9"
    assert "less than 0.1," in report.problems[0].expected
    document["models"] = entries(models, "a", "b", "c")
    document["parameters"] = {"density": 0.9}
    assert the(run(document)).where == "parameters.epsilon"
    document["parameters"] = {"density": 0.9, "epsilon": 0.05}
    assert not run(document).problems
    assert not run({**document, "merge_method": "nan_ties", "parameters": {}}).problems


def test_all_violations_of_a_contract(models: Path) -> None:
    report = run(
        {
            "merge_method": "slerp",
            "models": entries(models, "a", "b", "c", "c"),
            "parameters": {"t": 0.5},
        }
    )
    assert "`slerp` needs" in at(report, "base_model").expected
    assert "Add `base_model:`" in at(report, "base_model").remedy
    assert at(report, "models").found == "3 models"
    assert "exactly 2" in at(report, "models").expected
    assert "models[2]" in at(report, "models[3].model").found


def test_too_few_models_and_base_outside_of_a_slice(models: Path) -> None:
    report = run(
        {
            "merge_method": "model_stock",
            "base_model": str(models / "base"),
            "models": entries(models, "a"),
        }
    )
    assert "at least 3" in the(report).expected
    assert "the base among them" in the(report).found
    sources = [{"model": str(models / name), "layer_range": [0, 2]} for name in "ab"]
    report = run(
        {
            "merge_method": "ties",
            "base_model": str(models / "base"),
            "slices": [{"sources": sources}],
            "parameters": {"weight": 1},
        }
    )
    assert the(report).where == "slices[0].sources"
    assert "Add a source" in the(report).remedy


class Fake(ExtMethod):
    """A method with rules of its own, as the project's methods have them."""

    spec = MergeMethodSpec(
        name="fake",
        parameters=(
            ParameterSpec("mu", float, ParameterScope.SHARED, default=1.0),
            ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0),
        ),
        contract=InputContract(base=BasePolicy.FORBIDDEN),
    )

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def merge_one(self, *_: Any) -> Any:
        raise AssertionError("nothing is merged by a check")

    def problems(self, shared: Mapping[str, Any], inputs: Inputs) -> Iterable[Problem]:
        self.asked.append((dict(shared), inputs))
        if shared["mu"] > 5:
            yield Problem(f"{inputs.where}.mu", str(shared["mu"]), "at most 5", "Lower it.")

    def notes(self, shared: Mapping[str, Any], inputs: Inputs) -> Iterable[str]:
        yield f"mu is {shared['mu']}"

    def passes(self, shared: Mapping[str, Any]) -> int:
        return 2


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    method = Fake()
    monkeypatch.setitem(merge_methods.registry._METHODS, "fake", method)
    return method


@pytest.mark.only_checked("the method merges nothing")
def test_a_method_is_asked_once_for_each_set_of_shared_parameters(models: Path, fake: Fake) -> None:
    document = {"merge_method": "fake", "models": entries(models, "a", "b")}
    once = run(document)
    assert once.problems == () and once.notes == ("mu is 1.0",)
    assert fake.asked == [({"mu": 1.0}, Inputs(2, based=False))]
    linear = run({**LINEAR, "models": document["models"]})
    assert once.estimate is not None and linear.estimate is not None
    assert once.estimate.bytes_read == 2 * linear.estimate.bytes_read

    fake.asked.clear()
    mu = [{"filter": "mlp", "value": 7}, {"value": 2}]
    report = run({**document, "parameters": {"mu": mu}})
    assert [asked[0]["mu"] for asked in fake.asked] == [2.0, 7.0]
    assert str(the(report)) == "parameters.mu: found 7.0; expected at most 5. Lower it."


def test_a_method_is_asked_even_when_no_model_can_be_read(tmp_path: Path, fake: Fake) -> None:
    report = run(
        {
            "merge_method": "fake",
            "models": entries(tmp_path, "x", "y"),
            "parameters": {"mu": 6},
        }
    )
    assert {p.where for p in report.problems} == {
        "parameters.mu",
        "models[0].model",
        "models[1].model",
    }


def test_forbidden_base(models: Path, fake: Fake) -> None:
    document = {"merge_method": "fake", "models": entries(models, "a", "b")}
    report = run({**document, "base_model": str(models / "base")})
    assert the(report).remedy == "Remove `base_model:`."
