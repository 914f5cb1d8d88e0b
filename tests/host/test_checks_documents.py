"""Texts and settings that are wrong before any model is looked at, with place and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ext.errors import ConfigError, require
from mergekit_ext.host.checks.merge import check_merge, check_source
from mergekit_ext.host.checks.schema import between_documents, parse, unknown_keys
from tests.host.small import LINEAR, at, entries, run, the


def test_unknown_keys_at_every_level() -> None:
    text = """
merge_metod: linear
merge_method: linear
models:
  - model: {model: {path: x, revison: main}}
    parameters: {weight: {value: 1, fliter: mlp}}
    wieght: 1
modules:
  text:
    slices:
      - sources: [{model: x, layer_range: [0, 1], parametres: {}}]
        residual_wieght: 1
tokenizer: {source: union, tokens: {a: {source: {kind: zero}, forse: true}}}
parameters:
  t: [{value: 1, fliter: a}, {value: 2, fitler: b}]
"""
    found = {problem.where: problem.remedy for problem in unknown_keys(text)}
    assert found == {
        "merge_metod": "Write `merge_method`.",
        "models[0].model.model.revison": "Write `revision`.",
        "models[0].parameters.weight.fliter": "Write `filter`.",
        "models[0].wieght": "Take it out.",
        "modules.text.slices[0].sources[0].parametres": "Write `parameters`.",
        "modules.text.slices[0].residual_wieght": "Write `residual_weight`.",
        "tokenizer.tokens.a.forse": "Write `force`.",
        "parameters.t[0].fliter": "Write `filter`.",
        "parameters.t[1].fitler": "Write `filter`.",
    }


def test_a_document_is_not_shown_for_every_key_in_it() -> None:
    class Document(dict[str, Any]):
        shown = 0

        def __repr__(self) -> str:
            Document.shown += 1
            return super().__repr__()

    content = Document({f"key{i}": i for i in range(200)}, merge_method=[1], models=[1] * 200)
    config, problems = parse(content)
    assert config is None and len(problems) > 100
    assert Document.shown <= 1


def test_misplaced_parameter_and_repeated_key() -> None:
    text = (
        "merge_method: linear\nmodels:\n- model: x\n  weight: 1\ndtype: float32\ndtype: float16\n"
    )
    found = {problem.where: problem for problem in unknown_keys(text)}
    assert found["models[0].weight"].remedy == "Put `weight:` under `parameters:`."
    assert "lines 5 and 6" in found["dtype"].found


def test_keys_are_only_checked_where_they_can_be_seen(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b"), "dytpe": "float32"}
    config = MergeConfiguration.model_validate(document)
    assert check_merge(config, MergeOptions())[0].problems == ()
    report, _ = check_merge(config, MergeOptions(), yaml.safe_dump(document))
    assert the(report).where == "dytpe"
    assert [p.where for p in unknown_keys({"merge_method": "ties", "name": "x"})] == []


def test_text_that_is_not_yaml() -> None:
    ((_, report),) = check_source("merge_method: [linear\nmodels: {", MergeOptions())
    assert the(report).where.startswith("line 2, column")
    ((_, report),) = check_source("", MergeOptions())
    assert "no document" in the(report).found
    ((_, report),) = check_source("just text", MergeOptions())
    assert "just text" in the(report).found


def test_schema_errors_are_located(models: Path) -> None:
    report = run(
        {
            "models": [{"model": str(models / "a"), "parameters": {"weight": {"filter": "x"}}}],
            "slices": [{"sources": [{"model": "x", "layer_range": [0]}]}],
            "dytpe": "float32",
        }
    )
    assert at(report, "merge_method").found == "nothing"
    assert "a list or a valid boolean" in at(report, "models[0].parameters.weight").expected
    assert at(report, "models, slices, modules").found == "models and slices"
    assert at(report, "dytpe").remedy == "Write `dtype`."
    assert any(p.where.startswith("slices[0].sources[0].layer_range") for p in report.problems)


def test_dtypes_template_and_tokenizer(models: Path) -> None:
    report = run(
        {
            **LINEAR,
            "models": entries(models, "a", "b"),
            "dtype": "bfloat61",
            "out_dtype": "int64",
            "chat_template": "chatlm",
            "tokenizer": {"source": "base"},
        },
        lora_merge_dtype="f16",
    )
    assert at(report, "dtype").remedy == "Write `bfloat16`."
    assert "float16" in at(report, "out_dtype").expected
    assert at(report, "--lora-merge-dtype").found == "'f16'"
    assert at(report, "chat_template").remedy == "Write `chatml`."
    assert "base_model" in at(report, "tokenizer.source").remedy


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
@pytest.mark.parametrize("method", ["linear", "flexmerge"])
def test_a_device_that_is_not_there(models: Path, method: str, device: str) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b"), "merge_method": method}
    problem = at(run(document, device=device), "--device")
    assert problem.found.startswith(f"{device}, which cannot be used (")
    assert "such as cpu" in problem.expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize(("option", "place"), [("cuda", "--cuda"), ("multi_gpu", "--multi-gpu")])
def test_accelerators_that_are_not_there(models: Path, option: str, place: str) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b")}
    assert at(run(document, **{option: True}), place)


@pytest.mark.only_checked("a tokenizer on the Hub")
def test_tokenizer_files_are_needed_where_the_tokenizer_comes_from(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "b"), "tokenizer_source": "x"}
    assert run(document).problems == ()  # a name on the Hub; the first model has a tokenizer
    document["tokenizer_source"] = str(models / "b")
    assert f"no tokenizer in {models / 'b'}" in the(run(document)).found
    document["tokenizer_source"] = "./nowhere"
    assert "no tokenizer in nowhere" in the(run(document)).found
    document |= {"tokenizer_source": "union", "models": entries(models, "b", "a")}
    assert f"no tokenizer in {models / 'b'}" in the(run(document)).found


def test_ten_mistakes_are_listed_at_once(models: Path, tmp_path: Path) -> None:
    document = {
        "merge_method": "dare_ties",
        "dytpe": "float32",
        "out_dtype": "bfloat61",
        "chat_template": "chatlm",
        "models": [
            *entries(models, "a", weight=1, densty=0.5),
            *entries(models, "large_vocab", weight="much"),
            *entries(models, "b", normalize=True),
            *entries(models, "b", weight=1),
            *entries(tmp_path, "nowhere", weight=1),
        ],
        "parameters": {"lamda": 1},
    }
    report = run(document)
    places = [problem.where for problem in report.problems]
    assert len(places) >= 10
    assert set(places) >= {
        "dytpe",
        "out_dtype",
        "chat_template",
        "base_model",
        "models[0].parameters.densty",
        "models[1].parameters.weight",
        "models[2].parameters.normalize",
        "models[2].parameters.weight",
        "models[3].model",
        "models[4].model",
        "parameters.lamda",
        "2 tensors (model.embed_tokens.weight, lm_head.weight)",
    }
    with pytest.raises(ConfigError) as error:
        require(report.problems, "this merge")
    assert error.value.problems == report.problems
    assert all(str(problem) in str(error.value) for problem in report.problems)


def test_documents_of_a_multi_merge(models: Path) -> None:
    first = {**LINEAR, "name": "first", "models": entries(models, "a", "b")}
    second = {**LINEAR, "models": [{"model": "first"}, *entries(models, "c")]}
    text = yaml.safe_dump_all([first, second])
    (name, one), (last, two) = check_source(text, MergeOptions())
    assert (name, last) == ("first", None)
    assert one.problems == () and one.estimate is not None
    assert two.problems == () and two.estimate is None
    assert "Nothing is estimated" in " ".join(two.notes)

    circle = {**first, "models": [{"model": "second"}]}
    text = yaml.safe_dump_all([circle, {**second, "name": "second"}, {**second, "name": "second"}])
    reports = [report for _, report in check_source(text, MergeOptions())]
    assert "depends on itself" in at(reports[0], "models").found
    assert "again" in at(reports[2], "name").found


def test_every_document_of_every_circle() -> None:
    pairs = {"a": "b", "b": "a", "c": "d", "d": "c", "e": "a", "..": "a", "": "x"}
    documents = [
        {**LINEAR, "models": [{"model": other}], **({"name": name} if name else {})}
        for name, other in pairs.items()
    ]
    problems = between_documents([*documents, documents[-1]])
    found = [[problem.found for problem in problems[i]] for i in range(len(problems))]
    assert found[:5] == [[f"{name!r}, which depends on itself"] for name in "abcd"] + [[]]
    assert found[5:] == [["'..'"], [], ["a second document without a name"]]


def test_an_unknown_method_without_a_near_name(models: Path) -> None:
    problem = the(run({"merge_method": "qqqq", "models": entries(models, "a", "b")}))
    assert "linear" in problem.expected and problem.remedy == "Choose one of them."
