"""Parameters and numbers of models that a method does not take, with place and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit import merge_methods
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
)

from mergekit_ext.declared import Inputs
from mergekit_ext.errors import Problem
from mergekit_ext.host.method import ExtMethod
from tests.host.small import LINEAR, at, entries, run, the


def merging(models: Path, method: str, *names: str, base: str = "", **rest: Any) -> dict[str, Any]:
    """A configuration; each name of a model may have parameters after a blank, as YAML."""
    found: dict[str, Any] = {"merge_method": method, "models": [], **rest}
    if base:
        found["base_model"] = str(models / base)
    for name, _, parameters in (text.partition(" ") for text in names):
        found["models"] += entries(models, name, **(yaml.safe_load(parameters or "{}")))
    return found


# Each with the place of its only problem, and with a part of it.
ONE_PROBLEM = {
    "the nearest method": (
        ("task_arithmatic", "a"),
        {},
        ("merge_method", "Write `task_arithmetic`."),
    ),
    "required for one model": (
        ("linear", "a {weight: 1}", "b"),
        {},
        ("models[1].parameters.weight", "Add `weight:`"),
    ),
    "a base of a method without base": (
        ("linear", "a {weight: 1}", "b {weight: 1}"),
        {"base": "base"},
        ("base_model", "remove `base_model:`"),
    ),
    "required for all": (
        ("slerp", "a", "b"),
        {"base": "a"},
        ("parameters.t", "a value for `t`"),
    ),
    "a filter that leaves tensors out": (
        ("linear", "a {weight: [{filter: self_attn, value: 1}]}", "b {weight: 1}"),
        {},
        (
            "13 tensors (model.embed_tokens.weight, model.layers.0.input_layernorm.weight, "
            "model.layers.0.post_attention_layernorm.weight and 10 more)",
            "no value in models[0].parameters.weight",
        ),
    ),
    "a gradient whose middle is invalid": (
        ("karcher", "deep"),
        {"parameters": {"max_iter": [1, 5]}},
        ("parameters.max_iter", "between the values of a gradient"),
    ),
    "too few models": (
        ("model_stock", "a"),
        {"base": "base"},
        ("models", "at least 3 inputs; got 2"),
    ),
}


@pytest.mark.parametrize(
    ("given", "rest", "expected"), ONE_PROBLEM.values(), ids=ONE_PROBLEM.keys()
)
def test_one_problem(given, rest, expected, models: Path) -> None:
    problem = the(run(merging(models, *given, **rest)))
    assert problem.where == expected[0] and expected[1] in str(problem)


def test_unknown_misplaced_and_invalid_parameters(models: Path) -> None:
    report = run(
        merging(
            models,
            "ties",
            "a {weigth: 1, weight: 1, normalize: true}",
            "b {weight: ['0.1', x], density: []}",
            base="base",
            parameters={"lamda": 1, "int8_mask": [{"filter": "mlp", "value": "maybe"}]},
        )
    )
    assert at(report, "models[0].parameters.weigth").remedy == "Write `weight`."
    assert at(report, "parameters.lamda").remedy == "Write `lambda`."
    assert "Move `normalize:`" in at(report, "models[0].parameters.normalize").remedy
    assert "valid number" in at(report, "models[1].parameters.weight[1]").expected
    assert at(report, "models[1].parameters.density").found == "an empty list"
    assert "boolean" in at(report, "parameters.int8_mask[0].value").expected
    assert len(report.problems) == 6


@pytest.mark.parametrize(
    ("given", "rest", "note"),
    [
        (
            ("linear", "a", "b"),
            {"parameters": {"weight": [{"filter": "attention.wq", "value": 1}, {"value": 2}]}},
            "'attention.wq' matches no tensor",
        ),
        (
            ("task_arithmetic", "base {weight: 1}", "a {weight: 1}"),
            {"base": "base"},
            "models[0].parameters.weight has no effect",
        ),
    ],
)
def test_without_effect_is_a_note(given, rest, note, models: Path) -> None:
    report = run(merging(models, *given, **rest))
    assert report.problems == () and any(note in text for text in report.notes)


def test_parameters_that_are_wrong_together(models: Path) -> None:
    names = ("a {density: 0.9}", "b {density: [0.5, 0.1], epsilon: 0.2}", "c {density: 0.5}")
    report = run(merging(models, "nan_della", *names, base="base"))
    assert [problem.where for problem in report.problems] == [
        "parameters.epsilon",
        "models[1].parameters.epsilon",
    ]
    assert report.problems[0].found == "0.15 with a density of 0.9"
    assert "less than 0.1," in report.problems[0].expected
    document = merging(models, "nan_della", *"abc", base="base", parameters={"density": 0.9})
    assert the(run(document)).where == "parameters.epsilon"
    document["parameters"]["epsilon"] = 0.05
    assert not run(document).problems


def test_all_violations_of_a_contract(models: Path) -> None:
    report = run(merging(models, "slerp", *"abcc", parameters={"t": 0.5}))
    assert "`slerp` needs" in at(report, "base_model").expected
    assert "Add `base_model:`" in at(report, "base_model").remedy
    assert at(report, "models").found == "3 models, no base"
    assert "exactly 2 inputs; got 3" in at(report, "models").expected
    assert "models[2]" in at(report, "models[3].model").found


def test_a_base_outside_of_a_slice(models: Path) -> None:
    sources = [{"model": str(models / name), "layer_range": [0, 2]} for name in "ab"]
    document = merging(models, "ties", base="base", parameters={"weight": 1})
    document |= {"models": None, "slices": [{"sources": sources}]}
    report = run(document)
    assert the(report).where == "slices[0]"
    assert "Base input is not present" in the(report).expected


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
    # The whole table, since its `nan_fake` is registered with it.
    there = merge_methods.registry._METHODS
    monkeypatch.setattr(merge_methods.registry, "_METHODS", {**there, "fake": method})
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
    report = run(merging(tmp_path, "fake", "x", "y", parameters={"mu": 6}))
    places = {"parameters.mu", "models[0].model", "models[1].model"}
    assert {p.where for p in report.problems} == places


def test_forbidden_base(models: Path, fake: Fake) -> None:
    report = run(merging(models, "fake", "a", "b", base="base"))
    assert "does not accept a base" in the(report).expected


@pytest.mark.parametrize(
    ("method", "parameters", "noted"),
    [
        ("nan", {"weight": [0.1, 1.0]}, True),
        ("lore", {"weight": [0.1, 1.0], "mu_relative": 0.1}, True),
        ("nan", {"weight": [0.1, 1.0], "scale": 1.0}, False),
        ("nan", {"weight": 0.5}, False),
    ],
)
def test_weights_that_fade_over_depth_while_norms_decide(models, method, parameters, noted) -> None:
    report = run(merging(models, method, "a", "b", base="base", parameters=parameters))
    assert report.problems == ()
    assert noted == any("only ratios of weights count" in note for note in report.notes)
