"""Planned files have the same bytes whatever process writes them; finished pieces are found."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.pieces import Journal, PlannedFile, PlannedFiles, as_bytes, split

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


LINES = [("tensor", "a", {"crc": 7}), ("tensor", "b", 0.1 + 0.2), ("norms", "a", [1e-300, math.pi])]
WHOLE = {(kind, key): value for kind, key, value in LINES}


def written(folder, lines=LINES, rank=0):
    """Add lines in a run of its own; return their file, if there are any."""
    before = set(folder.iterdir())
    journal = Journal(folder, rank)
    for line in lines:
        journal.add(*line)
    journal.close()
    return next(iter(set(folder.iterdir()) - before), None)


def test_pieces_of_all_processes_come_back_exactly(tmp_path):
    written(tmp_path, LINES[:2])
    written(tmp_path, LINES[2:], rank=1)
    assert Journal(tmp_path).finished == WHOLE


def test_the_last_line_of_the_last_run_counts(tmp_path):
    for run in range(12):
        written(tmp_path, [("tensor", "a", -run), ("tensor", "a", run)], rank=(run + 1) % 2)
        assert Journal(tmp_path).finished == {("tensor", "a"): run}


@given(st.integers(min_value=0))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("journal")
    path = written(folder)
    data = path.read_bytes()
    kept = data[: cut % (len(data) + 1)]
    path.write_bytes(kept)
    whole = LINES[: kept.count(b"\n")]
    assert Journal(folder).finished == {(kind, key): value for kind, key, value in whole}
    written(folder, LINES[len(whole) :])
    assert Journal(folder).finished == WHOLE


@given(st.integers(0), st.integers(1, 255))
def test_a_changed_byte_costs_its_line(tmp_path_factory, place, change):
    folder = tmp_path_factory.mktemp("journal")
    data = bytearray((path := written(folder)).read_bytes())
    data[place % len(data)] ^= change
    path.write_bytes(data)
    found = Journal(folder).finished
    assert found.items() <= WHOLE.items()
    assert len(found) >= len(LINES) - 2  # one, or two that the lost end of a line has joined


def test_a_line_of_anything_is_passed_over(tmp_path):
    path = written(tmp_path)
    texts = (b"\xff", b"[1]", b"{}", b"[[1],2,3]", b"[" * 100_000)
    made = b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)
    path.write_bytes(b'\xff\x00\n[1]\n["tensor","c",1]\n' + made + path.read_bytes())
    assert Journal(tmp_path).finished == WHOLE
