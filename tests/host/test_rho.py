"""How far merges of models went, from the files that were written; and factors from norms."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file

import mergekit_ext
from mergekit_ext.errors import OvershootWarning
from tests.host.test_stopped_merges import Stop

QUIET = MergeOptions(quiet=True, copy_tokenizer=False)
METHODS = {
    "nan": {},
    "nan by model": {"granularity": "model", "scale": 0.4},
    "nan_ties": {"density": 0.5},
    "nan_tsv_m": {},
    "lore": {"mu_relative": 0.1},
    "tsv_m": {},
    "pcb": {"density": 0.5},
    "emr": {},
    "task_arithmetic": {"weight": 1.0},  # mergekit's own
    "flexmerge": {"target_size": 1.0, "lambda": 0.9},
}


def document(models, method, parameters):
    return {
        "merge_method": method.split(" ")[0],
        "base_model": str(models / "base"),
        "models": [{"model": str(models / name)} for name in "abc"],
        "parameters": parameters,
    }


def merged(models, out, method, parameters):

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OvershootWarning)
        text = yaml.safe_dump(document(models, method, parameters))
        mergekit_ext.merge(text, out, QUIET)
    return json.loads((out / "merge_report.json").read_text())


def vectors(models, folder):
    """The merged task vector and those of the inputs, float64, by tensor."""
    read = [
        load_file(f / "model.safetensors") for f in (models / "base", *(models / n for n in "abc"))
    ]
    out = {}
    for path in folder.glob("*.safetensors"):
        out |= load_file(path)
    base, *inputs = read
    return [{n: t[n].double() - base[n].double() for n in base} for t in (out, *inputs)]


def norm(tensors):
    return float(torch.cat([t.flatten() for t in tensors]).norm())


EMR = {"algorithm": "emr", "target_size": 3, "granularity": "tensor"}


@pytest.mark.parametrize("method", METHODS)
def test_rho_is_that_of_the_files(method, models, tmp_path):
    found = merged(models, tmp_path / "out", method, METHODS[method])["rho"]
    own, *inputs = [norm(v.values()) for v in vectors(models, tmp_path / "out")]
    assert found["model"]["mean"] == pytest.approx(own / (sum(inputs) / 3), rel=1e-5)
    assert found["model"]["largest"] == pytest.approx(own / max(inputs), rel=1e-5)
    assert "rho" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "parameters"), [("linear", {"weight": 1.0}), ("nan", {}), ("flexmerge", EMR)]
)
def test_no_rho_is_no_entry(method, parameters, models, tmp_path):
    config = {**document(models, method, parameters)}
    if method != "flexmerge":
        del config["base_model"]
    mergekit_ext.merge(yaml.safe_dump(config), tmp_path / "out", QUIET)
    assert all("rho" not in r.read_text() for r in (tmp_path / "out").rglob("merge_report.json"))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("nan", {"scale": "auto"}),
        ("nan_ties", {"scale": "auto", "density": 0.5}),
        ("lore", {"lambda": "auto", "mu_relative": 0.1}),
        ("tsv_m", {"lambda": "auto"}),
        ("pcb", {"lambda": "auto", "density": 0.5}),
        ("flexmerge", {"lambda": "auto", "target_size": 1.0, "granularity": "tensor"}),
        ("flexmerge", {"algorithm": "nan", "scale": "auto", "target_size": 1.0}),
    ],
)
def test_auto_gives_the_rho_that_norms_promise(method, parameters, models, tmp_path):
    report = merged(models, tmp_path / "out", method, parameters)
    own, *inputs = vectors(models, tmp_path / "out")
    blocks = [[name] for name in own]
    if parameters.get("algorithm"):
        blocks = [[n for n in own if n.startswith("model.layers.1.mlp")]]
    for names in blocks:
        norms = [norm([v[n] for n in names]) for v in inputs]
        mean = sum(norms) / 3
        common = norm([sum(v[n] for v in inputs) for n in names]) / 3 / mean
        wanted = ((1 + common**2) / 2) ** 0.5
        if method == "tsv_m" and own[names[0]].ndim > 1:
            wanted *= 3**0.5
        assert norm([own[n] for n in names]) / mean == pytest.approx(wanted, rel=1e-4)
    assert report["rho"]["model"]["mean"] < 3**0.5


def test_beyond_one_the_factor_is_named(models, tmp_path):
    with pytest.warns(OvershootWarning, match=r"`scale: (\S+)` in place of 6") as found:
        mergekit_ext.merge(
            yaml.safe_dump(document(models, "nan", {"scale": 6})), tmp_path / "far", QUIET
        )
    scale = str(found[0].message).split("`scale: ")[1].split("`")[0]
    report = merged(models, tmp_path / "back", "nan", {"scale": float(scale)})
    assert report["rho"]["model"]["mean"] == pytest.approx(1, rel=1e-2)


def test_a_merge_that_goes_on_reports_the_same(models, tmp_path):

    text, out = yaml.safe_dump(document(models, "nan", {})), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        mergekit_ext.merge(text, out, QUIET, callbacks=[Stop(merged=5)])
    mergekit_ext.merge(text, out, QUIET)
    whole = merged(models, tmp_path / "whole", "nan", {})
    assert json.loads((out / "merge_report.json").read_text()) == whole


def test_without_a_base_the_factor_is_one(models, tmp_path):
    given = document(models, "nan", {})
    del given["base_model"]
    files = []
    for scale in ({}, {"scale": 1}):
        out = mergekit_ext.merge({**given, "parameters": scale}, tmp_path / str(scale), QUIET)
        (file,) = out.path.glob("*.safetensors")
        files.append(file.read_bytes())
    assert files[0] == files[1]
