"""``mergekit-ext check``: exit codes, the listing, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from mergekit_ext.cli.check import check
from tests.models import config, family, llama


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A configuration of two models of a class that transformers does not have."""
    kind = json.dumps({"architectures": ["OwnModel"], "model_type": "llama"})
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"x": torch.zeros(500, 4)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(kind)
    return config("linear", [tmp_path / "a", tmp_path / "b"], None, {"weight": 0.5})


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration of a base and a model."""
    base, (tuned,) = family(tmp_path_factory.mktemp("models"), llama, amounts=(0.01,))
    return config("nan", [tuned], base)


def run(document: Any, *flags: str) -> Result:
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    return CliRunner().invoke(check, ["-", *flags], input=text)


def test_fine_merge_prints_the_estimate(merge: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(merge))
    result = CliRunner().invoke(check, [str(file)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:5] == [
        "No problems.",
        "Output:        30 tensors, 27,360 parameters",
        "Bytes read:    218.88kB",
        "Bytes written: 109.44kB",
        "Bytes held:    155.65kB at most, estimated",
    ]


@pytest.mark.parametrize(
    ("method", "following"), [("nan", "mergekit-yaml"), ("decompose", "mergekit-ext decompose")]
)
def test_the_next_command(merge: dict[str, Any], method: str, following: str) -> None:
    tuned = merge["models"][0]["model"]
    shared, own = ({"rank": 2}, {"task": "b"}) if method == "decompose" else ({}, {})
    models = [{"model": tuned}, {"model": f"{tuned}/.", "parameters": own}]
    result = run({**merge, "merge_method": method, "models": models, "parameters": shared})
    assert result.exit_code == 0, result.output
    assert f"Next: {following} " in result.stderr


def test_problems_are_listed_and_give_exit_code_2(files: dict[str, Any]) -> None:
    result = run({**files, "merge_method": "lineer", "dytpe": "float32"})
    assert result.exit_code == 2
    assert "2 problems:" in result.stdout
    assert "1. dytpe: found" in result.stdout and "Write `dtype`." in result.stdout
    assert "2. merge_method: found 'lineer'" in result.stdout


def test_json_is_all_that_is_on_stdout(files: dict[str, Any], merge: dict[str, Any]) -> None:
    result = run(merge, "--json")
    assert result.exit_code == 0
    (document,) = json.loads(result.stdout)["documents"]
    assert document["name"] is None and document["problems"] == []
    assert document["estimate"]["bytes_read"] == 218880
    result = run({**files, "parameters": {"wieght": 1}}, "--json")
    assert result.exit_code == 2
    (document,) = json.loads(result.stdout)["documents"]
    assert document["problems"][0]["remedy"] == "Write `weight`."
    assert set(document["problems"][0]) == {"where", "found", "expected", "remedy"}


def test_every_document_is_shown(files: dict[str, Any], tmp_path: Path) -> None:
    models = [{"model": str(tmp_path / "nowhere")}]
    text = yaml.safe_dump_all([files, {**files, "name": "last", "models": models}])
    result = run(text)
    assert result.exit_code == 2
    assert result.stdout.startswith("No problems.")
    assert "\n\nlast:\n1 problem:\n  1. models[0].model: found" in result.stdout


def test_flags_reach_the_check(files: dict[str, Any]) -> None:
    assert run(files).exit_code == 0
    assert run(files, "--max-memory", "1kB").exit_code == 2


def test_bad_arguments(files: dict[str, Any], tmp_path: Path) -> None:
    assert CliRunner().invoke(check, [str(tmp_path / "nowhere.yml")]).exit_code == 2
    result = run(files, "--out-shard-size", "big")
    assert result.exit_code == 2 and "found 'big'" in result.output
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    result = CliRunner().invoke(check, [str(tmp_path / "binary.yml")])
    assert result.exit_code == 2 and "cannot be read" in result.output
