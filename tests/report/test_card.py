"""What model cards and reports say of merges."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard
from mergekit.options import MergeOptions

import mergekit_ext
import peft_merge
from mergekit_ext.core.memory import in_models
from mergekit_ext.flexmerge.reader import read_manifest
from mergekit_ext.report.card import (
    REPORT_NAME,
    coefficients_section,
    copies_section,
    flexmerge_section,
    in_effect,
    method_section,
    model_card,
    solver_section,
    write_report,
)
from tests.models import bert, config, family, write_yaml

SIZE = {"models": 2.25, "bytes": 1234567, "private_bytes": 0}


def nan_details(group, a, b):
    return {"group": group, "coefficients": {"/home/me/a": a, "org/b": b}, "scale": 1.5}


def kind(name):
    return name.partition(".")[0]


def test_coefficients_have_a_row_for_each_kind_of_block():
    details = {f"mlp.{i}": nan_details(f"mlp.{i}", i / 100, 1 - i / 100) for i in range(101)}
    details["norm.0"] = nan_details("norm.0", 0.25, 0.75)
    assert coefficients_section(details, kind).splitlines()[2:] == [
        "Global factor (`scale`): 1.5000.",
        "",
        "| blocks | a | b |",
        "| --- | --- | --- |",
        "| mlp | 0.5000 (0.0000 to 1.0000) | 0.5000 (0.0000 to 1.0000) |",
        "| norm | 0.2500 | 0.7500 |",
    ]


def test_slices_of_different_models_have_a_row_each():
    other = {"group": "model", "coefficients": {"/home/me/a": 0.5, "org/c": 0.5}, "scale": 1.5}
    section = coefficients_section({"x": nan_details("model", 0.25, 0.75), "y": other}, kind)
    assert "| blocks | a | b | c |" in section
    assert section.count("| model | 0.2500 | 0.7500 |  |") == 1
    assert "| model | 0.5000 |  | 0.5000 |" in section


def test_copied_tensors_have_a_row_for_each_outermost_module():
    layer = ("attn.q.weight", "attn.k.weight", "mlp.weight", "norm.weight")
    tower = [f"vision.{name}" for name in ("conv.weight", "layers.0.fc1.weight", "norm.bias")]
    names = [*tower, *(f"text.layers.{i}.{end}" for i in range(12) for end in layer)]
    copied = dict.fromkeys(tower, "/models/base")
    copied |= {n: "/models/base" for n in names if "text" in n and ("attn" in n or ".3." in n)}
    copied |= {n: "/models/chat" for n in names if n.endswith("5.norm.weight")}
    section = copies_section([*names, "lm_head.weight"], {**copied, "lm_head.weight": "org/chat"})
    assert section.splitlines()[4:] == [
        "| `vision.*` | 3 | /models/base |",
        "| `text.layers.[0-11].attn.*` | 22 | /models/base |",
        "| `text.layers.3.*` | 4 | /models/base |",
        "| `text.layers.5.norm.*` | 1 | /models/chat |",
        "| `lm_head.*` | 1 | org/chat |",
    ]
    assert copies_section(names, {}) == ""


def test_names_that_would_be_the_same_stay_long():
    details = {"group": "model", "coefficients": {"run1/final": 0.5, "run2/final": 0.5}, "scale": 1}
    assert "| blocks | run1/final | run2/final |" in coefficients_section({"x": details}, kind)


def test_nothing_to_tell():
    assert coefficients_section({"x": {}}, kind) == ""
    assert solver_section({"x": {"iterations": 0}}) == ""


def test_solver():
    details = {
        f"t{i}": {
            "iterations": i,
            "converged": i < 3,
            "ranks": {"a": i, "b": 7},
            "singular_values": {"a": 0.5 * i, "b": 2.0},
        }
        for i in (1, 2, 3)
    }
    section = solver_section(details)
    assert "2 of 3 tensors converged, in 1 / 2 / 3 iterations" in section
    assert "| a | 1 / 2 / 3 | 0.5 to 1.5 |" in section


def test_every_paper_has_its_bibtex():
    found = {**mergekit_ext.methods(), **peft_merge.methods()}
    papers = {one.paper for one in found.values() if one.paper and "arxiv" in one.paper}
    for paper in papers:
        section = method_section("", paper)
        assert section.count("@") == 1 and f"url = {{{paper}}}" in section, paper
    assert method_section("", "https://example.com/a-method-of-others") == ""


@pytest.mark.parametrize(
    ("model", "task", "loaded"),
    [
        ("BertForMaskedLM", "", 'BertForMaskedLM.from_pretrained("out")'),
        ("BertModel", "a", 'BertModel.from_pretrained("out", subfolder="a")'),
    ],
)
def test_metadata_and_how_to_load(model, task, loaded):
    stock = "---\nbase_model: [org/base]\ntags: [merge]\n---\n# out\n"
    card = ModelCard(model_card("", model, "out", stock, task))
    pipeline = "fill-mask" if model.endswith("MaskedLM") else None
    assert card.data.pipeline_tag == pipeline and card.data.base_model_relation == "merge"
    assert card.data.base_model == ["org/base"] and card.data.tags == ["merge", "mergekit-ext"]
    assert f"from transformers import {model}\n\n{loaded}\n```" in card.text
    local = ModelCard(model_card("", "", "out", stock.replace("org/base", "")))
    assert local.data.base_model is None and "Use" not in local.text


@pytest.mark.parametrize(
    ("each", "line"),
    [
        ([{}, {"weight": 1.0}], "scale auto, weight 1.0"),
        ([{"density": 0.5}, {"weight": 2.0}], "scale auto, weight [1.0, 2.0], density [0.5, None]"),
    ],
)
def test_parameters_in_effect(each, line):
    assert in_effect({"scale": "auto", "weight": 1.0, "norm_of": None}, each) == line


def test_write_report(tmp_path):
    write_report(tmp_path, "nan", {"x": {"scale": 1.0}}, seed=0)
    content = json.loads((tmp_path / REPORT_NAME).read_text())
    tensors = {"x": {"scale": 1.0}}
    assert content == {"format_version": 1, "method": "nan", "seed": 0, "tensors": tensors}


def test_size_tasks_and_copies():
    section = flexmerge_section(SIZE, [("a", True), ("b", True)], {"attention": (4, 6)})
    assert section.startswith("### FlexMerge\n")
    assert "2 tasks in the space of 2.25 models: 1,234,567 bytes in all." in section
    assert "Ordinary checkpoints, one folder each: a, b." in section
    assert "| attention | 4 | 1.50 of 2 |" in section
    assert "mask" not in section and "only one task" not in section


def test_private_bytes():
    section = flexmerge_section({**SIZE, "private_bytes": 4096}, [("a", True)], {"mlp": (1, 1)})
    assert "2.25 models, and 4,096 bytes of what is not merged: 1,234,567" in section


def test_masked_tasks_are_named_with_what_they_need():
    tasks = [("a", True), ("b", False), ("c", False)]
    section = flexmerge_section(SIZE, tasks, {"mlp": (1, 1)})
    assert "one folder each: a." in section
    (line,) = [
        line
        for line in section.splitlines()
        if line.startswith("Stored as masks or residuals: b, c.")
    ]
    assert "flexmerge.load(" in line and "mergekit-ext export" in line
    assert "Ordinary" not in flexmerge_section(SIZE, tasks[1:], {"mlp": (1, 1)})


@pytest.mark.parametrize("algorithm", ["ties", "emr"])
def test_the_card_of_a_merge(tmp_path, algorithm):
    base, models = family(tmp_path, bert)
    parameters = {"target_size": 2.4, "algorithm": algorithm}
    document = config("flexmerge", models, base, parameters)
    out = tmp_path / "out"
    mergekit_ext.merge(write_yaml(tmp_path / "m.yml", document), out, MergeOptions(quiet=True))
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and "merge" in card.data.tags
    manifest = read_manifest(out)
    assert f"3 tasks in the space of {in_models(manifest.size.models):.10g} models" in card.text
    assert f"{manifest.size.bytes:,} bytes in all" in card.text
    assert f"{manifest.size.private_bytes:,} bytes of what is not merged" in card.text
    attention = [len(block.groups) for block in manifest.blocks if block.kind == "attention"]
    copies = sum(attention) / len(attention)
    assert f"| attention | {len(attention)} | {copies:.2f} of 3 |" in card.text
    masked = [task.name for task in manifest.tasks if not task.ordinary]
    assert bool(masked) == (algorithm == "emr")
    assert ("Stored as masks or residuals: " + ", ".join(masked) in card.text) == bool(masked)
