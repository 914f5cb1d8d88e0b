"""Writing safetensors files as the tensors come."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_ext.flexmerge.shards import ShardWriter, planned_shards
from mergekit_ext.flexmerge.storage import Place
from mergekit_ext.io.headers import read_safetensors
from mergekit_ext.io.planned import Entry
from mergekit_ext.parallel import Ranks

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)
KEY = Place("dense", ("a", "b"))


def entries(tensors):
    return [Entry.of(name, t.dtype, t.shape) for name, t in tensors.items()]


def begun(folder, sets, limit=0, whole=True):
    folder.mkdir(exist_ok=True)
    declared = {key: entries(tensors) for key, tensors in sets.items()}
    writer = ShardWriter(folder, planned_shards(declared, ("a", "b"), limit), whole=whole)
    writer.create()
    return writer


def written(folder, sets, limit=0):
    writer = begun(folder, sets, limit)
    for key, tensors in sets.items():
        for name, tensor in tensors.items():
            writer.write(key, name, tensor)
    return writer.finish(Ranks()), writer


def test_any_reader_reads_them(tmp_path):
    torch.manual_seed(0)
    tensors = {f"{d}": (torch.randn(3, 5) * 9).to(d) for d in DTYPES}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 3), 'ünï/"': torch.ones(2)}
    (file,), _ = written(tmp_path / "out", {KEY: tensors})
    path = tmp_path / "out" / file.path
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert (file.kind, file.tasks, file.path) == (*KEY, "shards/dense-00001.safetensors")
    assert file.bytes == path.stat().st_size
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_safetensors(path).keys() == tensors.keys()


def test_views_are_written_as_they_look(tmp_path):
    torch.manual_seed(0)
    wide = torch.randn(4, 6)
    tensors = {"t": wide.T, "slice": wide[1:, ::2], "expanded": wide[:1].expand(3, 6)}
    (file,), _ = written(tmp_path / "out", {KEY: tensors})
    for name, tensor in load_file(tmp_path / "out" / file.path).items():
        assert torch.equal(tensor, tensors[name])


def test_a_tensor_that_needs_gradients(tmp_path):
    tensor = torch.ones(3, requires_grad=True)
    (file,), _ = written(tmp_path / "out", {KEY: {"w": tensor}})
    assert torch.equal(load_file(tmp_path / "out" / file.path)["w"], torch.ones(3))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 100))
def test_no_file_is_larger_than_asked_unless_one_tensor_is(tmp_path_factory, sizes, limit):
    tensors = {f"t{i}": torch.full((n,), i, dtype=torch.float32) for i, n in enumerate(sizes)}
    folder = tmp_path_factory.mktemp("s") / "out"
    files, writer = written(folder, {KEY: tensors}, limit)
    seen = {}
    for (path, listed), file in zip(writer.where(KEY), files, strict=True):
        assert path == file.path
        content = load_file(folder / path)
        assert {e.name for e in listed} == content.keys()
        size = sum(t.numel() * 4 for t in content.values())
        assert (
            limit == 0
            or size <= limit
            or len(content) == 1
            or size == max(t.numel() * 4 for t in content.values())
        )
        assert seen.keys().isdisjoint(content)
        seen |= content
    assert seen.keys() == tensors.keys()
    if limit == 0:
        assert len(files) == 1
    # Greedy: two neighbours would not have fitted into one file.
    whole = [sum(e.nbytes for e in listed) for _, listed in writer.where(KEY)]
    firsts = [listed[0].nbytes for _, listed in writer.where(KEY)]
    for before, first in zip(whole, firsts[1:], strict=False):
        assert before + first > limit


def test_many_sets_are_open_at_once(tmp_path):
    sets = {
        Place("dense", (f"t{i}",)): {"x": torch.full((3,), i), "y": torch.full((2,), -i)}
        for i in range(150)
    }
    sets = {k: {n: t.float() for n, t in v.items()} for k, v in sets.items()}
    folder = tmp_path / "out"
    writer = begun(folder, sets)
    for name in ("x", "y"):  # back and forth between all of them
        for key, tensors in sets.items():
            writer.write(key, name, tensors[name])
    for file in writer.finish(Ranks()):
        content = load_file(folder / file.path)
        assert torch.equal(content["x"], sets[Place(file.kind, file.tasks)]["x"])
        assert torch.equal(content["y"], sets[Place(file.kind, file.tasks)]["y"])
        assert file.sha256 == hashlib.sha256((folder / file.path).read_bytes()).hexdigest()


def test_what_was_not_declared(tmp_path):
    writer = begun(tmp_path / "size", {KEY: {"x": torch.ones(3)}})
    with pytest.raises(AssertionError, match="x"):
        writer.write(KEY, "x", torch.ones(3, dtype=torch.float16))
    with pytest.raises(KeyError):
        writer.write(KEY, "y", torch.ones(3))
    writer.close()
    writer.close()  # as an exception's `finally` may


@pytest.mark.parametrize("whole", [True, False])
def test_any_order_gives_the_same_files_and_digests(whole, tmp_path):
    tensors = {"x": torch.ones(3), "none": torch.zeros(0), "y": torch.ones(2)}
    outs = []
    for names in (["x", "none", "y"], ["y", "x", "none"], ["x", "y", "none"]):
        writer = begun(tmp_path / "-".join(names), {KEY: tensors}, whole=whole)
        for name in names:
            writer.write(KEY, name, tensors[name])
        outs.append(writer.finish(Ranks()))
    assert outs[0] == outs[1] == outs[2]
    assert outs[0] == written(tmp_path / "again", {KEY: tensors})[0]


def test_sums_are_of_what_lies_there(tmp_path):
    tensors = {"x": torch.ones(3), "y": torch.ones(2)}
    writer = begun(tmp_path / "out", {KEY: tensors})
    found, planned = [], [(KEY, entry) for entry in entries(tensors)]
    for name, tensor in tensors.items():
        writer.write(KEY, name, tensor)
        writer.done(found.append)
    writer.wait()
    (one,), (two,) = found
    assert writer.holds(planned, [one, two])
    assert not writer.holds(planned, [one, one])
    assert not writer.holds(planned, [one])
    path = tmp_path / "out" / "shards" / "dense-00001.safetensors"
    stray = path.with_name("dense-00002.safetensors")
    stray.write_text("of a larger plan")
    writer.create()  # again: what is written stays, what is no shard goes
    assert writer.holds(planned, [one, two])
    assert not stray.exists()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert writer.holds(planned[:1], [one])
    assert not writer.holds(planned, [one, two])
    writer.close()


def test_kinds_are_numbered_apart(tmp_path):
    one = {"x": torch.ones(1)}
    places = [KEY, Place("dense", ("a",)), Place("base", ()), Place("unified", ("a",))]
    sets = dict.fromkeys(places, one)
    files, _ = written(tmp_path / "out", sets)
    assert [file.path for file in files] == [
        "shards/dense-00001.safetensors",
        "shards/dense-00002.safetensors",
        "shards/base-00001.safetensors",
        "shards/unified-00001.safetensors",
    ]
    assert [file.tasks for file in files] == [("a", "b"), ("a",), ("a", "b"), ("a",)]
