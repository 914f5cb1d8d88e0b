"""Finished pieces are found again, and what a kill or a disk has spoilt is not."""

from __future__ import annotations

import math
import zlib

from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.io.journal import Journal

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
