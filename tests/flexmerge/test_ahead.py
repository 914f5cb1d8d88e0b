"""Reading ahead and around the page cache gives the bytes that lie in the files."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from mergekit_ext.flexmerge import ahead
from mergekit_ext.flexmerge.ahead import Ahead
from mergekit_ext.headers import TensorHeader

PIECE = ahead._PIECE
LENGTHS = [1, 4095, 8192, PIECE - 3, PIECE, 2 * PIECE + 77, 0, 3 * PIECE, 5]


@pytest.fixture(params=["the page cache", "the disk", "whatever holds it"])
def way(request, monkeypatch):
    if request.param != "whatever holds it":
        monkeypatch.setattr(ahead, "_cached", lambda *_: request.param == "the page cache")
    return request.param


def stored(folder, lengths=LENGTHS, skip=13):
    """A file of tensors that start anywhere, one after the other to its end."""
    path = folder / "weights"
    content = torch.randint(256, (skip + sum(lengths),), dtype=torch.uint8)
    path.write_bytes(content.numpy().tobytes())
    headers, start = [], skip
    for length in lengths:
        headers.append(TensorHeader(str(start), "U8", (length,), length, path, start))
        start += length
    return path, content, headers


def drop(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def test_every_byte_is_read(tmp_path, way):
    path, content, headers = stored(tmp_path)
    drop(path)
    order = [*headers, *reversed(headers)]
    reads = Ahead(order)
    for header in order:
        out = torch.zeros(header.nbytes, dtype=torch.uint8)
        reads.read(header, out)
        assert torch.equal(out, content[header.offset : header.offset + header.nbytes])
    reads.close()


def test_more_than_the_room_holds(tmp_path, way, monkeypatch):
    monkeypatch.setattr(ahead, "_PIECES", 2)
    _, content, headers = stored(tmp_path, [7 * PIECE + 1, 9])
    reads = Ahead(headers)
    for header in headers:
        out = torch.zeros(header.nbytes, dtype=torch.uint8)
        reads.read(header, out)
        assert torch.equal(out, content[header.offset : header.offset + header.nbytes])
    reads.close()


def test_a_file_that_became_shorter(tmp_path, way):
    path, _, headers = stored(tmp_path, [PIECE, PIECE])
    os.truncate(path, 13 + 2 * PIECE - 1)
    reads = Ahead(headers)
    out = torch.zeros(PIECE, dtype=torch.uint8)
    reads.read(headers[0], out)
    with pytest.raises(OSError, match="shorter"):
        reads.read(headers[1], out)
    reads.close()


def test_a_file_that_is_gone(tmp_path):
    path, _, headers = stored(tmp_path, [10])
    path.unlink()
    reads = Ahead(headers)
    with pytest.raises(FileNotFoundError):
        reads.read(headers[0], torch.zeros(10, dtype=torch.uint8))
    reads.close()


def test_the_page_cache_is_asked(tmp_path):
    path, _, headers = stored(tmp_path, [4 * PIECE])
    piece = next(ahead._pieces_of(headers[0]))
    path.read_bytes()
    handle = os.open(path, os.O_RDONLY)
    assert ahead._cached(handle, piece)
    drop(path)
    dropped = not ahead._cached(handle, piece)
    os.close(handle)
    if not dropped:
        pytest.skip("this file system keeps files in memory")


def test_no_thread_is_left(tmp_path):
    _, _, headers = stored(tmp_path)
    Ahead(headers).close()
    assert not [t for t in threading.enumerate() if t.name.startswith("mergekit-ext-ahead")]
