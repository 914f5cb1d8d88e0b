"""Planned files have the same bytes whatever process writes them."""

from __future__ import annotations

import zlib

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.planned_files import PlannedFile, PlannedFiles, as_bytes, split

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "t": torch.arange(6.0).view(2, 3).t(),
}
FILE = PlannedFile(
    "shards/one.safetensors",
    tuple(TensorHeader.of(name, t.dtype, t.shape) for name, t in TENSORS.items()),
)


def test_any_order_and_any_process_gives_the_same_file(tmp_path):
    contents = set()
    for names in (list(TENSORS), list(reversed(TENSORS))):
        folder = tmp_path / str(len(contents))
        first, second = PlannedFiles(folder), PlannedFiles(folder)
        first.create([FILE])
        for index, name in enumerate(names):
            (first, second)[index % 2].put(FILE, name, as_bytes(TENSORS[name]))
        first.close()
        second.close()
        contents.add((folder / FILE.path).read_bytes())
    assert len(contents) == 1
    read = load_file(folder / FILE.path)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_sums_are_of_what_lies_there(tmp_path):
    files = PlannedFiles(tmp_path)
    files.create([FILE])
    files.put(FILE, "a", as_bytes(TENSORS["a"]))
    crc = files.crc(FILE, "a")
    assert crc == zlib.crc32(TENSORS["a"].numpy().tobytes())
    assert files.crc(FILE, "t") != zlib.crc32(TENSORS["t"].contiguous().numpy().tobytes())
    files.create([FILE])  # what is there stays
    assert files.crc(FILE, "a") == crc
    with (tmp_path / FILE.path).open("r+b") as file:
        file.truncate(FILE.length - 1)
    files.create([FILE])  # what is not whole is made anew
    assert files.crc(FILE, "a") != crc
    with pytest.raises(AssertionError, match="planned"):
        files.put(FILE, "a", as_bytes(TENSORS["a"].double()))


def test_a_link_in_the_place_of_a_file_is_not_written_through(tmp_path):
    (tmp_path / "shards").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(FILE.header.ljust(FILE.length, b"x"))
    (tmp_path / FILE.path).symlink_to(elsewhere)
    PlannedFiles(tmp_path).create([FILE])
    assert not (tmp_path / FILE.path).is_symlink()
    assert elsewhere.read_bytes().endswith(b"x")


def test_files_are_cut_by_bytes():
    entries = [TensorHeader.of(str(i), torch.uint8, (size,)) for i, size in enumerate((3, 3, 9, 1))]
    cut = [[entry.nbytes for entry in file] for file in split(entries, 6)]
    assert cut == [[3, 3], [9], [1]]
    assert len(split(entries, 0)) == 1
