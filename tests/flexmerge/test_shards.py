"""Files under ``shards/``: planned, written as the tensors come, and digested."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_ext.flexmerge.stored import Place
from mergekit_ext.flexmerge.writer import Piece, Shards, sharded
from mergekit_ext.io.headers import TensorHeader, read_safetensors
from mergekit_ext.io.journal import Finished, Journal
from mergekit_ext.parallel import Ranks, joined

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)
KEY = Place("dense", (0, 1))
TASKS = ("a", "b")


def entries(tensors):
    return [TensorHeader.of(name, t.dtype, t.shape) for name, t in tensors.items()]


def begun(folder, sets, limit=0, finished=None):
    folder.mkdir(exist_ok=True)
    declared = {key: entries(tensors) for key, tensors in sets.items()}
    shards = Shards(folder, sharded(declared, limit), finished or Finished())
    shards.create()
    return shards


def ended(shards, tasks=TASKS):
    shards.finish()
    shards.close()
    return shards.described(tasks)


def written(folder, sets, limit=0, order=None):
    shards = begun(folder, sets, limit)
    for key, tensors in sets.items():
        for name in order or tensors:
            shards.write(key, name, tensors[name])
    return ended(shards), shards


def test_any_reader_reads_them(tmp_path):
    torch.manual_seed(0)
    wide = torch.randn(4, 6)
    tensors = {f"{d}": (torch.randn(3, 5) * 9).to(d) for d in DTYPES}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 3), 'ünï/"': torch.ones(2)}
    tensors |= {"t": wide.T, "slice": wide[1:, ::2], "expanded": wide[:1].expand(3, 6)}
    tensors["trained"] = torch.ones(3, requires_grad=True)
    (file,), _ = written(tmp_path / "out", {KEY: tensors})
    path = tmp_path / "out" / file.path
    found = load_file(path)
    assert found.keys() == tensors.keys() == read_safetensors(path).keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert (file.kind, file.tasks, file.path) == ("dense", TASKS, "shards/dense-00001.safetensors")
    assert file.bytes == path.stat().st_size
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 100))
def test_no_file_is_larger_than_asked_unless_one_tensor_is(tmp_path_factory, sizes, limit):
    tensors = {f"t{i}": torch.full((n,), i, dtype=torch.float32) for i, n in enumerate(sizes)}
    folder = tmp_path_factory.mktemp("s") / "out"
    files, shards = written(folder, {KEY: tensors}, limit)
    planned = list(shards.files.values())
    assert [each.path for each in planned] == [file.path for file in files]
    contents = [load_file(folder / file.path) for file in files]
    assert sorted(name for content in contents for name in content) == sorted(tensors)
    assert len(files) == 1 or limit > 0
    for each, content in zip(planned, contents, strict=True):
        assert {entry.name for entry in each.entries} == content.keys()
        held = [t.nbytes for t in content.values()]
        assert limit == 0 or sum(held) <= limit or sum(held) == max(held)
    # Greedy: two neighbours would not have fitted into one file.
    for before, after in zip(contents, planned[1:], strict=False):
        assert sum(t.nbytes for t in before.values()) + after.entries[0].nbytes > limit


def test_many_sets_are_open_at_once(tmp_path):
    sets = {
        Place("dense", (i,)): {"x": torch.full((3,), float(i)), "y": torch.full((2,), -float(i))}
        for i in range(150)
    }
    shards = begun(tmp_path / "out", sets)
    for name in ("x", "y"):  # back and forth between all of them
        for key, tensors in sets.items():
            shards.write(key, name, tensors[name])
    for file in ended(shards, tuple(map(str, range(150)))):
        path, expected = tmp_path / "out" / file.path, sets[Place("dense", (int(*file.tasks),))]
        assert all(torch.equal(t, expected[name]) for name, t in load_file(path).items())
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_was_not_declared(tmp_path):
    shards = begun(tmp_path / "size", {KEY: {"x": torch.ones(3)}})
    with pytest.raises(AssertionError, match="x"):
        shards.write(KEY, "x", torch.ones(3, dtype=torch.float16))
    with pytest.raises(KeyError):
        shards.write(KEY, "y", torch.ones(3))
    shards.close()
    shards.close()  # as an exception's `finally` may


class Second(Ranks):
    """The first of two processes, both of which have the same values."""

    def __init__(self):
        super().__init__(0, 2)

    def _exchange(self, value):
        return [value, value]


@pytest.mark.parametrize("others", [False, True])
def test_any_order_gives_the_same_files_and_digests(others, tmp_path):
    tensors = {"x": torch.ones(3), "none": torch.zeros(0), "y": torch.ones(2)}
    (expected,), _ = written(tmp_path / "again", {KEY: tensors})
    with joined(Second() if others else Ranks()):
        for order in (["x", "none", "y"], ["y", "x", "none"], ["x", "y", "none"]):
            (file,), _ = written(tmp_path / "-".join(order), {KEY: tensors}, order=order)
            assert file == expected


def test_a_recorded_piece_is_made_again_if_it_does_not_lie_there(tmp_path):
    tensors = {"x": torch.ones(3), "y": torch.ones(2)}
    made = []

    def run(groups=()):
        """Write both tensors, a piece each; return which of them were made."""
        made.clear()

        def making(name):
            made.append(name)
            yield KEY, name, tensors[name]

        journal = Journal(tmp_path)
        shards = begun(tmp_path / "out", {KEY: tensors}, 8, Finished(journal, "subject"))
        for name, tensor in tensors.items():
            piece = [(KEY, entry) for entry in entries({name: tensor})]
            shards.make(Piece(name, 0, [*groups], piece, making(name)))
        ended(shards)
        journal.close()
        return list(made)

    assert run() == ["x", "y"]
    home = tmp_path / "out" / "shards"
    stray = home / "dense-00003.safetensors"
    stray.write_text("of a larger plan")
    assert run() == []
    assert not stray.exists()
    with (home / "dense-00002.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert run() == ["y"]
    (home / "dense-00001.safetensors").unlink()
    assert run() == ["x"]
    assert run(groups=["others"]) == ["x", "y"]
    assert torch.equal(load_file(home / "dense-00002.safetensors")["y"], tensors["y"])


def test_kinds_are_numbered_apart(tmp_path):
    one = {"x": torch.ones(1)}
    places = [KEY, Place("dense", (0,)), Place("base", ()), Place("unified", (0,))]
    files, _ = written(tmp_path / "out", dict.fromkeys(places, one))
    assert [file.path for file in files] == [
        "shards/dense-00001.safetensors",
        "shards/dense-00002.safetensors",
        "shards/base-00001.safetensors",
        "shards/unified-00001.safetensors",
    ]
    assert [file.tasks for file in files] == [TASKS, ("a",), TASKS, ("a",)]
