"""The eight tasks of the FlexMerge example, and its training in the short form."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("sklearn")

from examples.flexmerge import train
from examples.flexmerge.__main__ import main
from examples.flexmerge.config import write_config
from examples.flexmerge.data import TASKS, load_tasks
from examples.flexmerge.evaluate import evaluate
from examples.quickstart import train as quickstart
from examples.quickstart.evaluate import load


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``python -m examples.flexmerge --quick`` writes."""
    folder = tmp_path_factory.mktemp("flexmerge")
    threads = torch.get_num_threads()
    assert main(["--quick", "--out", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_all_its_classes_in_every_split(name: str) -> None:
    task = load_tasks()[name]
    for split in task.splits.values():
        assert split.images.shape == (len(split), 3, 16, 16)
        assert split.images.min() >= -1 and split.images.max() <= 1
        labels = split.labels - task.offset
        assert set(labels.tolist()) == set(range(len(task.class_names)))


def test_no_tile_is_in_two_splits_in_any_form() -> None:
    tasks = load_tasks()
    tiles = {
        split: {image.numpy().tobytes() for image in data.images}
        for split, data in tasks["scene"].splits.items()
    }
    # These classes show tiles as they are.
    plain = {"channels": "rgb", "seam": "none", "count": "0"}
    for name, label in plain.items():
        task = tasks[name]
        number = task.offset + task.class_names.index(label)
        for split, data in task.splits.items():
            shown = {i.numpy().tobytes() for i in data.images[data.labels == number]}
            assert shown and shown <= tiles[split], f"{name}, {split}"
    for one in tiles:
        for other in tiles:
            assert one == other or not tiles[one] & tiles[other]


def test_place_tells_where_a_tile_was_changed() -> None:
    tasks = load_tasks()
    tiles = tasks["scene"].splits["test"].images
    task = tasks["place"]
    data = task.splits["test"]
    for image, label in zip(data.images[:20], data.labels[:20], strict=True):
        row, column = divmod(int(label) - task.offset, 3)
        differs = (tiles != image).any(dim=1)
        differs[:, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8] = False
        assert not differs.flatten(1).any(dim=1).all()  # one tile is the same everywhere else


def test_the_curve_and_the_merge(output: Path) -> None:
    content = json.loads((output / "sizes.json").read_text(encoding="utf-8"))
    assert set(content["reference"]) == set(TASKS)
    lines = {point["algorithm"]: point["size"] for point in content["points"]}
    assert {*lines} == {"residual"} and 1.0 < lines["residual"] < 1.1
    assert all(set(point["scores"]) == set(TASKS) for point in content["points"])
    assert (output / "sizes.png").stat().st_size > 10_000
    for name in TASKS:
        assert set(evaluate(load(output / "merged" / name), name)) == {"accuracy"}


@pytest.mark.parametrize("name", TASKS)
def test_checkpoints_are_complete_and_name_their_classes(output: Path, name: str) -> None:
    model = load(output / "models" / name)  # refuses what does not fill the model
    classes = load_tasks()[name].class_names
    assert model.config.id2label == dict(enumerate(classes))
    assert model.classifier.weight.shape == (len(classes), 128)
    score = evaluate(model, name)
    assert set(score) == {"accuracy"} and 0.0 <= score["accuracy"] <= 1.0


def test_only_the_heads_differ_in_shape(output: Path) -> None:
    base = load(output / "models/base").state_dict()
    assert base["classifier.weight"].shape == (52, 128)
    for name in TASKS:
        own = load(output / "models" / name).state_dict()
        odd = {key for key in base if own[key].shape != base[key].shape}
        assert set(own) == set(base)
        assert odd == {"classifier.weight", "classifier.bias"}
        assert any(not torch.equal(own[key], base[key]) for key in base.keys() - odd)


def test_a_task_can_be_trained_again_alone(output: Path) -> None:
    tasks = load_tasks()
    base = load(output / "models/base")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    again = train.finetune(base, tasks["scene"], tuple(tasks.values()), train.QUICK, seed=3)
    torch.set_num_threads(threads)
    for key, tensor in load(output / "models/scene").state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor)


def test_the_config_names_the_models(output: Path, tmp_path: Path) -> None:
    document = yaml.safe_load((output / "merge.yml").read_text(encoding="utf-8"))
    assert document["merge_method"] == "flexmerge"
    assert json.loads((Path(document["base_model"]) / "config.json").read_text())
    assert [entry["parameters"]["task"] for entry in document["models"]] == list(TASKS)
    for entry in document["models"]:
        assert Path(entry["model"]).name == entry["parameters"]["task"]
        assert (Path(entry["model"]) / "model.safetensors").is_file()
    assert document["parameters"] == {"target_size": 2.0, "algorithm": "task_arithmetic"}
    other = yaml.safe_load(write_config(tmp_path, 3.5, "ties").read_text(encoding="utf-8"))
    assert other["parameters"] == {"target_size": 3.5, "algorithm": "ties"}


def test_a_task_starts_with_its_rows_of_the_classifier() -> None:
    tasks = load_tasks()
    base = quickstart.new_model(tuple(tasks.values()), seed=0, layers=1).eval()
    still = train.Schedule(pretrain_steps=0, finetune_steps=2, finetune_lr=1e-12)
    task = tasks["count"]
    model = train.finetune(base, task, tuple(tasks.values()), still, seed=0)
    images = task.splits["test"].images[:8]
    with torch.no_grad():
        expected = base(pixel_values=images).logits[:, task.classes]
        torch.testing.assert_close(model(pixel_values=images).logits, expected)


class Oracle:
    """Answers with the labels of the test images, in order, but is wrong ``errors`` times."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, name: str, errors: int, classes: int | None = None) -> None:
        task = load_tasks()[name]
        n = len(task.class_names)
        labels = task.splits["test"].labels - task.offset
        labels[:errors] = (labels[:errors] + 1) % n
        self.logits = torch.nn.functional.one_hot(labels, classes or n).float()

    def __call__(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        answer, self.logits = self.logits.split(
            [len(pixel_values), len(self.logits) - len(pixel_values)]
        )
        return SimpleNamespace(logits=answer)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("errors", [0, 7])
def test_accuracy_counts_right_answers(name: str, errors: int) -> None:
    n = len(load_tasks()[name].splits["test"])
    assert evaluate(Oracle(name, errors), name) == {"accuracy": (n - errors) / n}


def test_evaluate_refuses_what_it_cannot_score() -> None:
    with pytest.raises(KeyError, match="'digits' is not one of digit, rotation"):
        evaluate(Oracle("digit", 0), "digits")
    with pytest.raises(ValueError, match="count has 5 classes; the model has 52"):
        evaluate(Oracle("count", 0, classes=52), "count")
