"""Planned files hold the same bytes whatever process writes them, in whatever order."""

from __future__ import annotations

import zlib

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ext.io.planned import Entry, PlannedFile, PlannedFiles, split

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "t": torch.arange(6.0).view(2, 3).t(),
}


def planned():
    entries = tuple(Entry.of(name, t.dtype, t.shape) for name, t in TENSORS.items())
    return PlannedFile("shards/one.safetensors", entries)


def test_any_order_and_any_process_gives_the_same_file(tmp_path):
    contents = set()
    for names in (list(TENSORS), list(reversed(TENSORS))):
        folder = tmp_path / str(len(contents))
        first, second = PlannedFiles(folder), PlannedFiles(folder)
        first.create([planned()])
        for index, name in enumerate(names):
            (first, second)[index % 2].write(planned(), name, TENSORS[name])
        first.close()
        second.close()
        contents.add((folder / "shards/one.safetensors").read_bytes())
    assert len(contents) == 1
    read = load_file(folder / "shards/one.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_digests_tell_what_lies_there(tmp_path):
    files = PlannedFiles(tmp_path)
    files.create([planned()])
    crc = files.write(planned(), "a", TENSORS["a"])
    assert crc == files.crc(planned(), "a") == zlib.crc32(TENSORS["a"].numpy().tobytes())
    assert files.crc(planned(), "t") != zlib.crc32(TENSORS["t"].contiguous().numpy().tobytes())
    files.create([planned()])  # what is there stays
    assert files.crc(planned(), "a") == crc
    with (tmp_path / planned().path).open("r+b") as file:
        file.truncate(planned().length - 1)
    files.create([planned()])  # what is not whole is made anew
    assert files.crc(planned(), "a") != crc


def test_a_link_in_the_place_of_a_file_is_not_written_through(tmp_path):
    file = planned()
    (tmp_path / "shards").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(file.header.ljust(file.length, b"x"))
    (tmp_path / file.path).symlink_to(elsewhere)
    PlannedFiles(tmp_path).create([file])
    assert not (tmp_path / file.path).is_symlink()
    assert elsewhere.read_bytes().endswith(b"x")


def test_what_was_not_planned_is_not_written(tmp_path):
    files = PlannedFiles(tmp_path)
    files.create([planned()])
    with pytest.raises(AssertionError, match="planned"):
        files.write(planned(), "a", TENSORS["a"].double())


def test_files_are_cut_by_bytes():
    entries = [Entry.of(str(i), torch.uint8, (size,)) for i, size in enumerate((3, 3, 9, 1))]
    cut = [[entry.nbytes for entry in file] for file in split(entries, 6)]
    assert cut == [[3, 3], [9], [1]]
    assert len(split(entries, 0)) == 1
