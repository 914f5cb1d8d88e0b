"""Export: an ordinary folder, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from mergekit_ext.errors import CheckpointError, ConfigError
from mergekit_ext.flexmerge.reader import export
from mergekit_ext.flexmerge.runtime import load
from tests.flexmerge.handmade import edited, models, vit, write
from tests.flexmerge.test_task_folders import linked_copy
from tests.models import state

TASKS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """One task that is stored dense, three with masks, and files of many kinds."""
    folder = tmp_path_factory.mktemp("export")
    base, paths = models(folder, vit, TASKS)
    for path in paths.values():
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "short.jinja").write_text("{{ x }}")
        (path / "pytorch_model.bin").write_bytes(b"not these weights")
    groups = [(["a"], "dense"), (["b", "c", "d"], "masked")]
    return folder / "out", write(folder / "out", base, paths, lambda block: groups)


@pytest.fixture
def checkpoint(made: Any, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return linked_copy(made[0], tmp_path / "checkpoint")


@pytest.mark.parametrize("task", TASKS)
def test_weights_and_files_of_the_task(made: Any, tmp_path: Path, task: str) -> None:
    checkpoint, expected = made
    export(checkpoint, task, tmp_path / "deep" / "one")
    found = {
        path.relative_to(tmp_path / "deep").as_posix()
        for path in (tmp_path / "deep").rglob("*")
        if path.is_file()
    }
    assert found == {
        "one/config.json",
        "one/vocab.txt",
        "one/additional_chat_templates/short.jinja",
        "one/model.safetensors",
    }
    for name in ("config.json", "vocab.txt"):
        assert (tmp_path / "deep/one" / name).read_bytes() == (
            checkpoint / task / name
        ).read_bytes()
    tensors = state(tmp_path / "deep" / "one")
    assert set(tensors) == set(expected[task])
    for name, value in expected[task].items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("task", ["a", "b"])
def test_transformers_reads_it(made: Any, tmp_path: Path, task: str) -> None:
    export(made[0], task, tmp_path / "one", shard_bytes=4000)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "one")
    pixels = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, load(made[0], task)(pixels).logits)


def test_shards_and_index(made: Any, tmp_path: Path) -> None:
    export(made[0], "b", tmp_path / "one", shard_bytes=4000)
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    total = 0
    for file in files:
        with safe_open(tmp_path / "one" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = set(opened.keys())
            sizes = [opened.get_tensor(name).nbytes for name in names]
        assert names == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(sizes) <= 4000 or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(made[1]["b"])


@pytest.mark.parametrize("place", ["file", "folder", "file/one"])
def test_a_place_that_is_taken(made: Any, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    with pytest.raises(ConfigError, match=r"this export; nothing was done:\n  1\. OUT: found"):
        export(made[0], "a", tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "mine"]


def test_digests_are_compared_by_default(checkpoint: Path, tmp_path: Path) -> None:
    with edited(checkpoint) as content:
        content["files"][0]["sha256"] = "0" * 64
    with pytest.raises(CheckpointError, match="SHA-256"):
        export(checkpoint, "a", tmp_path / "one")
    assert not (tmp_path / "one").exists()
    export(checkpoint, "a", tmp_path / "one", verify=False)
    assert (tmp_path / "one").exists()


def test_unknown_task(made: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="task: found 'z'"):
        export(made[0], "z", tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_no_file_from_elsewhere_is_copied(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "a" / "vocab.txt").unlink()
    (checkpoint / "a" / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"a/vocab\.txt: found a link to .*secret"):
        export(checkpoint, "a", tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_no_configuration(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "a" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a/config\.json: found no file"):
        export(checkpoint, "a", tmp_path / "one")


def test_nothing_is_left_after_a_failure(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mergekit_ext.flexmerge.reader.save_file", full)
    with pytest.raises(ConfigError, match=r"an error while writing \(no space left"):
        export(made[0], "b", tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_a_place_in_the_checkpoint_and_a_task_that_is_misspelt(made: Any) -> None:
    with pytest.raises(ConfigError, match="inside of it; expected a folder outside"):
        export(made[0], "a", made[0] / "new")
    with pytest.raises(CheckpointError, match="Write `a`"):
        export(made[0], "A", made[0].parent / "new")


def test_a_missing_file_is_copied_again(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "a" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no file .*\n?.*Copy or download the file again"):
        export(checkpoint, "a", tmp_path / "one")


def test_a_dtype_that_is_none_is_no_fault_of_the_checkpoint(made: Any) -> None:
    with pytest.raises(ConfigError, match="dtype: found 'floot'; expected"):
        load(made[0], dtype="floot")
