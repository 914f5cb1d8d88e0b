"""``mergekit-ext export``: exit codes and messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mergekit_ext.cli import main
from tests.flexmerge.handmade import edited, models, vit, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    base, paths = models(tmp_path, vit, ["a", "b", "c"])
    write(tmp_path / "out", base, paths, lambda block: [(["a", "b", "c"], "masked")])
    return tmp_path / "out"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_writes_the_task(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "b", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


def test_what_is_wrong_is_a_message(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "z", tmp_path / "z")
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "task: found 'z'; expected one of a, b, c" in result.stderr
    assert not (tmp_path / "z").exists()


def test_digests(checkpoint: Path, tmp_path: Path) -> None:
    with edited(checkpoint) as content:
        content["files"][0]["sha256"] = "0" * 64
    result = run(checkpoint, "b", tmp_path / "b")
    assert result.exit_code == 2
    assert "SHA-256" in result.stderr
    assert run(checkpoint, "b", tmp_path / "b", "--no-verify").exit_code == 0


def test_no_such_folder(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing", "a", tmp_path / "a")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_is_listed() -> None:
    assert "export" in CliRunner().invoke(main, ["--help"]).output
