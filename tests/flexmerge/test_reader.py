"""Reading a checkpoint: its tensors, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ext.errors import CheckpointError
from mergekit_ext.flexmerge.manifest import read_manifest
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.io.schema import LARGEST
from tests.flexmerge.handmade import described, edited, models, redescribe, vit, write
from tests.flexmerge.test_task_folders import linked_copy
from tests.models import bert

TASKS = ["one", "two", "three", "four", "five"]


def mixed(block: str) -> list[tuple[list[str], str]]:
    """Every kind of group, and blocks without masks."""
    if "attention" in block:
        return [(["one", "two"], "dense"), (["three", "four", "five"], "masked")]
    if block == "rest":
        return [(TASKS, "dense")]
    if block == "layer 1 other":
        return [(["one", "five"], "residual"), (["two", "three", "four"], "residual")]
    return [(["one", "three"], "masked"), (["two"], "dense"), (["four", "five"], "dense")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("reader")
    base, paths = models(folder, bert, TASKS)
    return folder / "out", write(folder / "out", base, paths, mixed)


@pytest.fixture
def out(made: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return linked_copy(made[0], tmp_path / "out")


def test_tensors_are_those_of_the_task(made: Any) -> None:
    checkpoint = open_checkpoint(made[0], verify=True)
    assert checkpoint.tasks == tuple(TASKS)
    for task, expected in made[1].items():
        tensors = checkpoint.tensors(task)
        assert set(tensors) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-8)
            assert tensors[name].dtype == value.dtype


def test_tasks_share_storage_where_their_group_does(made: Any) -> None:
    checkpoint = open_checkpoint(made[0])
    tensors = {task: checkpoint.tensors(task) for task in TASKS}
    attention = "bert.encoder.layer.0.attention.self.query.weight"
    rest, mlp = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"

    def same(name: str, first: str, second: str) -> bool:
        # Both at once: the memory of a reconstructed tensor that is gone is used again.
        one, other = tensors[first][name], tensors[second][name]
        return one.data_ptr() == other.data_ptr()

    assert same(attention, "one", "two")
    assert all(same(rest, "one", task) for task in TASKS)
    assert same(mlp, "four", "five")
    assert not same(mlp, "two", "four")
    assert not same("classifier.weight", "one", "two")
    assert not same(attention, "three", "four")
    assert attention in {name for _, _, name in tensors["one"].stored()}
    assert attention not in {name for _, _, name in tensors["three"].stored()}


def test_writing_to_a_tensor_changes_no_file(out: Path) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    open_checkpoint(out).tensors("one")[name].zero_()
    tensors = open_checkpoint(out, verify=True).tensors("two")
    assert tensors[name].any()


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base, paths = models(tmp_path, vit, ["a", "b", "c"], torch.bfloat16)
    expected = write(tmp_path / "out", base, paths, lambda block: [(["a", "b", "c"], "masked")])
    checkpoint = open_checkpoint(tmp_path / "out")
    for task in "abc":
        tensors = checkpoint.tensors(task)
        for name, value in expected[task].items():
            assert tensors[name].dtype == torch.bfloat16
            assert torch.equal(tensors[name], value), name


def test_masks_that_start_in_mid_byte(tmp_path: Path) -> None:
    """Tensors of 1, 3 and 0 elements before others: no offset is a multiple of eight."""
    sizes = {"a": (1,), "b": (3,), "none": (0,), "c": (2, 5), "scalar": (), "z": (17,)}
    for name in ("base", "x", "y"):
        (tmp_path / name).mkdir()
        tensors = {key: torch.randn(shape) for key, shape in sizes.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    paths = {task: tmp_path / task for task in "xy"}
    groups = [(["x", "y"], "masked")]
    expected = write(tmp_path / "out", tmp_path / "base", paths, lambda block: groups)
    checkpoint = open_checkpoint(tmp_path / "out")
    for task in "xy":
        tensors = checkpoint.tensors(task)
        for name, shape in sizes.items():
            assert tensors[name].shape == shape
            torch.testing.assert_close(tensors[name], expected[task][name], rtol=1e-6, atol=1e-8)


def test_unknown_task(made: Any) -> None:
    with pytest.raises(CheckpointError, match="task: found 'six'; expected one of one, two"):
        open_checkpoint(made[0]).tensors("six")


# Everything that can be wrong

MANIFEST = "flexmerge.json"
DENSE, MASKS, UNIFIED, OTHER = (
    f"shards/{name}.safetensors"
    for name in ("dense-00001", "masks-00001", "unified-00001", "base-00009")
)


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def moved(out: Path, name: str, target: str | Path) -> None:
    """Leave a link, and have the file or folder outside of the checkpoint."""
    shutil.move(out / name, out.parent / "elsewhere")
    (out / name).symlink_to(target)


def as_described(out: Path, data: bytes) -> None:
    (out / DENSE).write_bytes(data)
    redescribe(out)


def overlapping(out: Path) -> None:
    places = {"a": [0, 8], "b": [4, 12]}
    entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": p} for n, p in places.items()}
    header = json.dumps(entries).encode()
    as_described(out, struct.pack("<Q", len(header)) + header + bytes(12))


def rewrite(out: Path, path: str, act: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file, and all of the manifest that depends on it but the blocks."""
    tensors = load_file(out / path)
    before = sum(tensor.nbytes for tensor in tensors.values())
    act(tensors)
    save_file(tensors, out / path, metadata={"format": "pt"})
    redescribe(out)
    add_bytes(out, sum(tensor.nbytes for tensor in tensors.values()) - before)


def add_bytes(out: Path, more: int) -> None:
    with edited(out) as content:
        size = content["size"]
        size["bytes"] += more
        size["models"] = (size["bytes"] - size["private_bytes"]) / size["unit_bytes"]


def wrong_length(out: Path) -> None:
    with edited(out) as content:
        content["files"][0]["bytes"] += 1


def in_two_files(out: Path) -> None:
    with edited(out) as content:
        first, *others = content["files"]
        second = next(file["path"] for file in others if file["tasks"] == first["tasks"])
    name, tensor = sorted(load_file(out / DENSE).items())[0]
    rewrite(out, second, lambda tensors: tensors.update({name: tensor}))


def not_needed(out: Path) -> None:
    save_file({"foreign": torch.ones(3)}, out / OTHER, metadata={"format": "pt"})
    with edited(out) as content:
        content["files"].append(described(out, OTHER) | {"kind": "base", "tasks": []})


def each(act: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: act(t) for name, t in tensors.items()})


# What spoils a checkpoint, and what the message of the error must hold.
SPOILED: dict[str, tuple[Any, ...]] = {
    "no JSON": (lambda out: (out / MANIFEST).write_text("{'format': 1}"), MANIFEST, "no JSON"),
    "no manifest": (lambda out: (out / MANIFEST).unlink(), MANIFEST, "no such file"),
    "a manifest that is a folder": (lambda out: instead(out / MANIFEST, Path.mkdir), MANIFEST),
    "a huge manifest": (lambda out: os.truncate(out / MANIFEST, LARGEST + 1), MANIFEST),
    "a missing file": (lambda out: (out / DENSE).unlink(), "1 problem", DENSE, "no file"),
    "two": (lambda out: [(out / p).unlink() for p in (DENSE, MASKS)], "2 problems", DENSE, MASKS),
    "a short file": (lambda out: os.truncate(out / DENSE, 99), DENSE, "99 bytes"),
    "a short tensor": (lambda out: as_described(out, (out / DENSE).read_bytes()[:-1]), DENSE),
    "a long file": (lambda out: as_described(out, (out / DENSE).read_bytes() + b"0"), DENSE),
    "a wrong length": (wrong_length, DENSE, "bytes"),
    "a file outside": (
        lambda out: moved(out, DENSE, "../../elsewhere"),
        *(DENSE, "outside of the checkpoint", "elsewhere"),
    ),
    "a folder outside": (
        lambda out: moved(out, "shards", out.parent / "elsewhere"),
        *(DENSE, "outside of the checkpoint"),
    ),
    "a loop of links": (
        lambda out: instead(out / DENSE, lambda path: path.symlink_to(path.name)),
        *(DENSE, "no file"),
    ),
    "a pipe": (lambda out: instead(out / DENSE, os.mkfifo), DENSE, "regular file"),
    "a folder": (lambda out: instead(out / DENSE, Path.mkdir), DENSE, "regular file"),
    "tensors that overlap": (overlapping, DENSE, "no safetensors file"),
    "an empty file": (lambda out: as_described(out, b""), DENSE, "no safetensors file"),
    "a missing tensor": (
        lambda out: rewrite(out, DENSE, dict.popitem),
        ": found nothing in the dense files of",
    ),
    "a missing mask": (
        lambda out: rewrite(out, MASKS, dict.popitem),
        ": found nothing in the masks files of",
    ),
    "another tensor": (
        lambda out: rewrite(out, DENSE, lambda tensors: tensors.update(foreign=torch.ones(3))),
        f"{DENSE}, tensor foreign: found a tensor that is not called for",
    ),
    "another shape": (
        lambda out: rewrite(out, DENSE, each(lambda tensor: tensor[None])),
        *(f"{DENSE}, tensor ", ": found shape [1, "),
    ),
    "a tensor in two files": (in_two_files, f", which {DENSE} holds too"),
    "masks of another dtype": (
        lambda out: rewrite(out, MASKS, each(lambda tensor: tensor.to(torch.int8))),
        *(MASKS, "dtype I8; expected U8"),
    ),
    "unified integers": (
        lambda out: rewrite(out, UNIFIED, each(Tensor.int)),
        *(UNIFIED, "dtype I32"),
    ),
    "a file that is not needed": (not_needed, OTHER, "foreign"),
    "a sum of bytes": (lambda out: add_bytes(out, 1), "size.bytes", "bytes of all tensors"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_refuses(out: Path, name: str) -> None:
    spoil, *parts = SPOILED[name]
    spoil(out)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(out)
    assert str(out) in str(caught.value)
    message = str(caught.value).replace(str(out), "")  # a test's folder has its name
    for part in parts:
        assert part in message


def test_digests_are_compared_when_asked(out: Path) -> None:
    data = (out / DENSE).read_bytes()
    (out / DENSE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    open_checkpoint(out)
    with pytest.raises(CheckpointError, match=f"{DENSE}: found SHA-256"):
        open_checkpoint(out, verify=True)


def test_links_inside_of_the_checkpoint_are_followed(out: Path) -> None:
    shutil.move(out / DENSE, out / "kept.safetensors")
    (out / DENSE).symlink_to("../kept.safetensors")
    assert open_checkpoint(out, verify=True).tensors("one")


def test_a_checkpoint_may_itself_be_a_link(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    assert open_checkpoint(tmp_path / "link").tensors("one")


def test_read_manifest_needs_no_other_file(out: Path) -> None:
    shutil.rmtree(out / "shards")
    assert [task.name for task in read_manifest(out).tasks] == TASKS
