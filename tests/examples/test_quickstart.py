"""The quickstart in its short form; `make quickstart` runs the whole with every method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples.quickstart.__main__ import main

METHODS = ["nan_ties"]
TASKS = ["digit", "rotation", "scene", "place"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``python -m examples.quickstart --quick`` writes, with one method."""
    folder = tmp_path_factory.mktemp("quickstart")
    assert main(["--quick", "--out", str(folder), "--methods", *METHODS]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(output: Path) -> dict[str, dict[str, Any]]:
    document = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in document["rows"]}


def test_every_row_is_there_with_accuracies(rows: dict[str, dict[str, Any]]) -> None:
    tuned = [f"{task} model" for task in TASKS]
    assert set(rows) == {"pre-trained start", *tuned, "individual models", *METHODS}
    for row in rows.values():
        assert list(row["accuracy"]) == TASKS
        assert all(0.0 <= score <= 1.0 for score in row["accuracy"].values())
        assert row["mean"] == pytest.approx(sum(row["accuracy"].values()) / len(TASKS))
        assert math.isfinite(row["normalised"]) and row["normalised"] >= 0
    assert rows["individual models"]["normalised"] == pytest.approx(1.0)


@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning_helps_its_own_task(rows: dict[str, dict[str, Any]], task: str) -> None:
    start = rows["pre-trained start"]["accuracy"][task]
    assert rows["individual models"]["accuracy"][task] > start + 0.03


@pytest.mark.parametrize("method", METHODS)
def test_merged_folder_is_a_complete_checkpoint(output: Path, method: str) -> None:
    from safetensors import safe_open
    from transformers import ViTForImageClassification

    merged = output / "merged" / method
    _, info = ViTForImageClassification.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values()), info
    with (
        safe_open(merged / "model.safetensors", "pt") as ours,
        safe_open(output / "models/pretrained/model.safetensors", "pt") as start,
    ):
        assert set(ours.keys()) == set(start.keys())


def test_the_checkpoints_name_their_classes(output: Path) -> None:
    config = json.loads((output / "models/digit/config.json").read_text(encoding="utf-8"))
    assert config["id2label"]["3"] == "digit:3"
    assert {name.split(":")[0] for name in config["label2id"]} == set(TASKS)


def test_plot_is_a_picture(output: Path) -> None:
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_no_source_image_is_in_two_splits() -> None:
    from examples.quickstart.data import load_tasks

    for task in load_tasks(seed=0)[::2]:  # the tasks whose images are the sources themselves
        images = {
            split: {image.numpy().tobytes() for image in data.images}
            for split, data in task.splits.items()
        }
        for one in images:
            for other in images:
                shared = images[one] & images[other] if one != other else set()
                assert not shared, f"{task.name}: {one} and {other}"
