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
from tests.models import bert

TASKS = ["one", "two", "three", "four", "five"]


def mixed(block: str) -> list[tuple[list[str], str]]:
    """Every kind of group, and blocks without masks."""
    if "attention" in block:
        return [(["one", "two"], "dense"), (["three", "four", "five"], "masked")]
    if block == "rest":
        return [(TASKS, "dense")]
    return [(["one", "three"], "masked"), (["two"], "dense"), (["four", "five"], "dense")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("reader")
    base, paths = models(folder, bert, TASKS)
    return folder / "out", write(folder / "out", base, paths, mixed)


@pytest.fixture
def out(made: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "out"))


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
    assert attention in tensors["one"].files
    assert attention not in tensors["three"].files


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


# Everything that can be wrong. Each function spoils a checkpoint and returns what the message of
# the error must hold.

DENSE = "shards/dense-00001.safetensors"


def not_json(out: Path) -> list[str]:
    (out / "flexmerge.json").write_text("{'format': 1}")
    return ["flexmerge.json", "no JSON"]


def no_manifest(out: Path) -> list[str]:
    (out / "flexmerge.json").unlink()
    return ["flexmerge.json", "no such file"]


def manifest_is_a_folder(out: Path) -> list[str]:
    (out / "flexmerge.json").unlink()
    (out / "flexmerge.json").mkdir()
    return ["flexmerge.json"]


def manifest_is_huge(out: Path) -> list[str]:
    with (out / "flexmerge.json").open("r+b") as file:
        file.truncate(LARGEST + 1)
    return ["flexmerge.json"]


def missing_file(out: Path) -> list[str]:
    (out / DENSE).unlink()
    return [DENSE, "no file"]


def two_missing_files(out: Path) -> list[str]:
    (out / DENSE).unlink()
    (out / "shards/masks-00001.safetensors").unlink()
    return ["2 problems", DENSE, "shards/masks-00001.safetensors"]


def truncated_file(out: Path) -> list[str]:
    os.truncate(out / DENSE, (out / DENSE).stat().st_size - 1)
    return [DENSE, "bytes"]


def truncated_file_of_the_given_length(out: Path) -> list[str]:
    truncated_file(out)
    redescribe(out)
    return [DENSE]


def longer_file(out: Path) -> list[str]:
    with (out / DENSE).open("ab") as file:
        file.write(b"\0")
    redescribe(out)
    return [DENSE]


def wrong_length(out: Path) -> list[str]:
    with edited(out) as content:
        content["files"][0]["bytes"] += 1
    return [DENSE, "bytes"]


def link_that_leaves(out: Path) -> list[str]:
    shutil.move(out / DENSE, out.parent / "elsewhere")
    (out / DENSE).symlink_to("../../elsewhere")
    return [DENSE, "outside of the checkpoint", "elsewhere"]


def folder_that_is_a_link(out: Path) -> list[str]:
    shutil.move(out / "shards", out.parent / "elsewhere")
    (out / "shards").symlink_to(out.parent / "elsewhere")
    return [DENSE, "outside of the checkpoint"]


def loop_of_links(out: Path) -> list[str]:
    (out / DENSE).unlink()
    (out / DENSE).symlink_to("loop")
    (out / "shards/loop").symlink_to(Path(DENSE).name)
    return [DENSE, "no file"]


def named_pipe(out: Path) -> list[str]:
    (out / DENSE).unlink()
    os.mkfifo(out / DENSE)
    return [DENSE, "regular file"]


def folder_for_a_file(out: Path) -> list[str]:
    (out / DENSE).unlink()
    (out / DENSE).mkdir()
    return [DENSE, "regular file"]


def raw(out: Path, header: bytes, data: bytes) -> None:
    (out / DENSE).write_bytes(struct.pack("<Q", len(header)) + header + data)
    redescribe(out)


def entry(*offsets: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": list(offsets)}


def overlapping_tensors(out: Path) -> list[str]:
    raw(out, json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode(), bytes(12))
    return [DENSE, "overlap"]


def empty_file(out: Path) -> list[str]:
    (out / DENSE).write_bytes(b"")
    redescribe(out)
    return [DENSE, "length of the header"]


def rewrite(out: Path, path: str, act: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file, and all of the manifest that depends on it but the blocks."""
    tensors = load_file(out / path)
    before = sum(tensor.nbytes for tensor in tensors.values())
    act(tensors)
    save_file(tensors, out / path, metadata={"format": "pt"})
    redescribe(out)
    with edited(out) as content:
        size = content["size"]
        size["bytes"] += sum(tensor.nbytes for tensor in tensors.values()) - before
        size["models"] = (size["bytes"] - size["private_bytes"]) / size["unit_bytes"]


def no_metadata(out: Path) -> list[str]:
    save_file(load_file(out / DENSE), out / DENSE)
    redescribe(out)
    return [DENSE, "metadata"]


def missing_tensor(out: Path) -> list[str]:
    name = sorted(load_file(out / DENSE))[0]
    rewrite(out, DENSE, lambda tensors: tensors.pop(name))
    return [f"{name}: found nothing in the dense files of"]


def missing_mask(out: Path) -> list[str]:
    path = "shards/masks-00001.safetensors"
    name = sorted(load_file(out / path))[0]
    rewrite(out, path, lambda tensors: tensors.pop(name))
    return [f"{name}: found nothing in the masks files of"]


def extra_tensor(out: Path) -> list[str]:
    rewrite(out, DENSE, lambda tensors: tensors.update(foreign=torch.ones(3)))
    return [f"{DENSE}, tensor foreign: found a tensor that is not called for"]


def wrong_shape(out: Path) -> list[str]:
    name, tensor = sorted(load_file(out / DENSE).items())[0]
    rewrite(out, DENSE, lambda tensors: tensors.update({name: tensor[None]}))
    return [f"{DENSE}, tensor {name}: found shape [1, "]


def tensor_in_two_files(out: Path) -> list[str]:
    with edited(out) as content:
        first = content["files"][0]
        second = next(f for f in content["files"][1:] if f["tasks"] == first["tasks"])["path"]
    name, tensor = sorted(load_file(out / DENSE).items())[0]
    rewrite(out, second, lambda tensors: tensors.update({name: tensor}))
    return [f"{second}: found {name}, which {DENSE} holds too"]


def masks_of_another_dtype(out: Path) -> list[str]:
    path = "shards/masks-00001.safetensors"
    rewrite(
        out, path, lambda tensors: tensors.update({n: t.to(torch.int8) for n, t in tensors.items()})
    )
    return [path, "dtype I8; expected U8"]


def unified_of_integers(out: Path) -> list[str]:
    path = "shards/unified-00001.safetensors"
    rewrite(out, path, lambda tensors: tensors.update({n: t.int() for n, t in tensors.items()}))
    return [path, "dtype I32"]


def file_that_is_not_needed(out: Path) -> list[str]:
    path = "shards/base-00009.safetensors"
    save_file({"foreign": torch.ones(3)}, out / path, metadata={"format": "pt"})
    with edited(out) as content:
        content["files"].append(described(out, path) | {"kind": "base", "tasks": []})
    return [path, "foreign"]


def sum_of_bytes(out: Path) -> list[str]:
    with edited(out) as content:
        size = content["size"]
        size["bytes"] += 1
        size["models"] = (size["bytes"] - size["private_bytes"]) / size["unit_bytes"]
    return ["size.bytes", "bytes of all tensors"]


SPOILERS = [
    not_json, no_manifest, manifest_is_a_folder, manifest_is_huge, missing_file, two_missing_files,
    truncated_file, truncated_file_of_the_given_length, longer_file, wrong_length, link_that_leaves,
    folder_that_is_a_link, loop_of_links, named_pipe, folder_for_a_file, overlapping_tensors,
    empty_file, no_metadata, missing_tensor, missing_mask, extra_tensor, wrong_shape,
    tensor_in_two_files, masks_of_another_dtype, unified_of_integers, file_that_is_not_needed,
    sum_of_bytes,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_refuses(out: Path, spoil: Callable[[Path], list[str]]) -> None:
    parts = spoil(out)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(out)
    for part in parts:
        assert part in str(caught.value)
    assert str(out) in str(caught.value)


def test_digests_are_compared_when_asked(out: Path) -> None:
    with (out / DENSE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
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
