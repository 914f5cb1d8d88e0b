"""Fields of config.json that decide the function are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.errors import MergeWarning
from tests.host.small import bert, checked, family, merging


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5})],
)
def test_a_field_of_the_function_is_named_with_its_values(
    field: str, value: Any, tmp_path: Path
) -> None:
    base, one, two = family(tmp_path)
    edit(two, **{field: value})
    document = merging(base, one, two)
    report = checked(document)
    assert not report.problems and len(report.warnings) == 1
    assert field in report.warnings[0] and str(two) in report.warnings[0]
    config = MergeConfiguration.model_validate(document)
    with pytest.warns(MergeWarning, match=f"{field}.*the output has the latter"):
        mergekit_ext.merge(config, tmp_path / "out", MergeOptions(quiet=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 2), ("hidden_act", "gelu")],
)
def test_weights_that_mean_something_else_are_refused(
    field: str, value: Any, tmp_path: Path
) -> None:
    base, one, two = family(tmp_path, num_key_value_heads=4, head_dim=4)
    edit(two, **{field: value})
    if field == "num_attention_heads":
        edit(two, num_key_value_heads=2, head_dim=8)
    problems = checked(merging(base, one, two)).problems
    assert f"models[1].model (config.json: {field})" in [problem.where for problem in problems]
    again = checked(merging(base, one, two), allow_crimes=True)
    assert not again.problems and any(field in text for text in again.warnings)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_cache", False), ("attention_dropout", 0.5), ("eos_token_id", 7), ("dtype", "float16")],
)
def test_fields_of_training_and_running_are_not_named(
    field: str, value: Any, tmp_path: Path
) -> None:
    base, one, two = family(tmp_path)
    edit(one, **{field: value})
    report = checked(merging(base, one, two))
    assert not report.problems and not report.warnings


def classifiers(folder: Path, *labels: list[str]) -> list[Path]:
    folders = []
    for index, names in enumerate(labels):
        ids = {name: i for i, name in enumerate(names)}
        config = bert(id2label=dict(enumerate(names)), label2id=ids)
        folders.append(folder / str(index))
        transformers.BertForSequenceClassification(config).save_pretrained(folders[-1])
    return folders


def test_labels_in_another_order(tmp_path: Path) -> None:
    folders = classifiers(tmp_path, ["no", "yes"], ["no", "yes"], ["yes", "no"])
    (problem,) = checked(merging(*folders)).problems
    assert problem.where == "models[1].model (config.json: id2label)"
    assert "['yes', 'no']" in problem.found and "['no', 'yes']" in problem.found
    flex = merging(*folders, method="flexmerge", parameters={"target_size": 2})
    assert not checked(flex).problems  # heads stay apart
    flex["parameters"]["heads"] = "merged"
    assert [p.where for p in checked(flex).problems] == [problem.where]


def test_default_labels_say_nothing(tmp_path: Path) -> None:
    folders = classifiers(tmp_path, ["LABEL_0", "LABEL_1"], ["no", "yes"], ["LABEL_0", "LABEL_1"])
    assert not checked(merging(*folders)).problems


def test_what_a_class_no_longer_has_is_no_difference(tmp_path: Path) -> None:
    folders = classifiers(tmp_path, ["a", "b"], ["a", "b"], ["a", "b"])
    edit(folders[0], position_embedding_type="absolute", gradient_checkpointing=False)
    report = checked(merging(*folders))
    assert not report.problems and not report.warnings


def test_labels_of_tasks_are_no_flood_of_warnings(tmp_path: Path) -> None:
    folders = classifiers(tmp_path, *[[f"{task}{i}" for i in range(9)] for task in "abc"])
    report = checked(merging(*folders, method="flexmerge", parameters={"target_size": 2}))
    assert not report.problems and not report.warnings


def test_lists_of_layers_follow_the_slices(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
    )
    kinds = config.layer_types
    assert len(set(kinds)) == 2
    for name in ("one", "two"):
        transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / name)
    ranges = [[0, 3], [2, 3], [1, 4]]
    slices = [
        {"sources": [{"model": str(tmp_path / n), "layer_range": r} for n in ("one", "two")]}
        for r in ranges
    ]
    document = {"merge_method": "nan", "slices": slices}
    assert not checked(document).problems
    out = tmp_path / "out"
    parsed = MergeConfiguration.model_validate(document)
    mergekit_ext.merge(parsed, out, MergeOptions(quiet=True))
    model = transformers.Gemma2ForCausalLM.from_pretrained(out)
    assert model.config.layer_types == [kinds[i] for a, b in ranges for i in range(a, b)]
    assert model.config.num_hidden_layers == 7
