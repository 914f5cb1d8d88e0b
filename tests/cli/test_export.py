"""``mergekit-ext export``: exit codes and messages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.cli import assert_refused, subcommand
from tests.flexmerge.handmade import edited, models, vit, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    base, paths = models(tmp_path, vit, ["a", "b", "c"])
    write(tmp_path / "out", base, paths, lambda block: [(["a", "b", "c"], "masked")])
    return tmp_path / "out"


run = partial(subcommand, "export")


def test_writes_the_task(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "b", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


def test_what_is_wrong_is_a_message(checkpoint: Path, tmp_path: Path) -> None:
    message = "task: found 'z'; expected one of a, b, c"
    assert_refused(run(checkpoint, "z", tmp_path / "z"), message)
    assert not (tmp_path / "z").exists()


def test_digests(checkpoint: Path, tmp_path: Path) -> None:
    with edited(checkpoint) as content:
        content["files"][0]["sha256"] = "0" * 64
    assert_refused(run(checkpoint, "b", tmp_path / "b"), "SHA-256")
    assert run(checkpoint, "b", tmp_path / "b", "--no-verify").exit_code == 0


def test_folders_that_are_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    inside = run(checkpoint / "b", "b", tmp_path / "b")
    assert_refused(inside, f"Give the folder above, {checkpoint}, and the task 'b'")
    (tmp_path / "other").mkdir()
    other = run(tmp_path / "other", "b", tmp_path / "b")
    assert_refused(other, "expected the manifest of a FlexMerge checkpoint")
    assert "above" not in other.stderr


def test_the_card_of_a_masked_task_stays(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "b" / "README.md").write_text("how to load it")
    assert run(checkpoint, "b", tmp_path / "b").exit_code == 0
    assert not (tmp_path / "b" / "README.md").exists()


def test_no_such_folder(tmp_path: Path) -> None:
    assert_refused(run(tmp_path / "nothing", "a", tmp_path / "a"), "does not exist")
