"""Reading stored tensors: bytes as they are, vectors in one dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_ext.flexmerge.source import BlockReader, FileSource, Source
from mergekit_ext.io.headers import read_safetensors
from tests.flexmerge.inputs import family, headers, layout, reader, source

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def every_kind():
    torch.manual_seed(0)
    state = {str(d): (torch.randn(5, 3) * 50).abs().to(d) for d in DTYPES}
    return {**state, "none": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}


def file_source(path: Path, state) -> FileSource:
    save_file(state, path)
    return FileSource(path.stem, read_safetensors(path))


@pytest.mark.parametrize("kind", ["file", "loaded"])
def test_bytes_come_as_they_are_stored(kind, tmp_path):
    state = every_kind()
    if kind == "file":
        source = file_source(tmp_path / "m.safetensors", state)
    else:
        # Loaders may hand out views of larger tensors.
        source = Source("m", headers(state), lambda n: torch.stack([state[n]] * 2, -1)[..., 0])
    for name, tensor in state.items():
        out = torch.full((tensor.numel(),), 7).to(tensor.dtype)
        source.read(name, out)
        assert torch.equal(out, tensor.reshape(-1))
        assert torch.equal(source.tensor(name), tensor)


def test_bit_patterns_survive():
    bits = torch.tensor([0x7FC1, -0x8000, 0x7F80, 1], dtype=torch.int16).view(torch.bfloat16)
    source = Source("m", headers({"w": bits}), lambda n: bits)
    out = torch.zeros(4, dtype=torch.bfloat16)
    source.read("w", out)
    assert torch.equal(out.view(torch.int16), bits.view(torch.int16))


def test_a_file_that_shrank_is_an_error(tmp_path):
    path = tmp_path / "m.safetensors"
    source = file_source(path, {"w": torch.randn(100)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(OSError, match="ends before w does"):
        source.read("w", torch.empty(100))


def test_a_block_is_its_tensors_end_to_end():
    base, models = family(3)
    found = reader(base, models)
    for block in found.layout.blocks:
        data = found.read(block)
        names = [part.name for part in block.parts]
        assert torch.equal(data.base, torch.cat([base[n].reshape(-1) for n in names]))
        assert list(data.models) == [0, 1, 2]
        for task, model in enumerate(models):
            assert torch.equal(data.models[task], torch.cat([model[n].reshape(-1) for n in names]))
            for index, name in enumerate(names):
                assert torch.equal(data.part(data.models[task], index), model[name])


def test_members_may_be_chosen():
    base, models = family(3)
    found = reader(base, models)
    data = found.read(found.layout.blocks[2], (2, 0))
    assert set(data.models) == {0, 2}
    assert torch.equal(data.part(data.models[2], 2), models[2]["attention.q"])


def test_each_vector_has_the_dtype_that_holds_its_tensors():
    base, models = family(2)
    models[0] = {n: t.to(torch.bfloat16) for n, t in models[0].items()}
    models[1]["mlp.up"] = models[1]["mlp.up"].half()
    found = reader(base, models)
    attention, mlp = found.layout.blocks[2], found.layout.blocks[-1]
    assert found.read(attention).models[0].dtype == torch.bfloat16
    data = found.read(mlp)
    assert data.models[1].dtype == torch.float32
    assert torch.equal(data.part(data.models[1], 1), models[1]["mlp.up"].float())
    assert torch.equal(data.part(data.models[1], 0), models[1]["mlp.down"])


@pytest.mark.parametrize("where", ["base", "model"])
def test_one_double_makes_every_vector_double(where):
    base, models = family(2, dtype=lambda task: torch.bfloat16)
    state = base if where == "base" else models[1]
    state["norm.weight"] = torch.randn(6, dtype=torch.float64)
    found = reader(base, models)
    for block in found.layout.blocks:
        data = found.read(block)
        assert {v.dtype for v in (data.base, *data.models.values())} == {torch.float64}


def test_memory_is_taken_once():
    base, models = family(2)
    found = reader(base, models)
    places = {
        tuple(v.data_ptr() for v in (data.base, *data.models.values()))
        for data in map(found.read, found.layout.blocks)
    }
    assert len(places) == 1


def test_reading_stored_bytes_leaves_the_block_that_is_being_merged_alone():
    base, models = family(2)
    found = reader(base, models)
    data = found.read(found.layout.blocks[2])
    before = [v.clone() for v in (data.base, *data.models.values())]
    for task in range(2):
        raw = found.read_stored(task, "embed.weight")
        assert torch.equal(raw.view(torch.float32).reshape(11, 6), models[task]["embed.weight"])
    for vector, kept in zip((data.base, *data.models.values()), before, strict=True):
        assert torch.equal(vector, kept)


def test_devices(device):
    base, models = family(2, dtype=lambda task: torch.bfloat16 if task == 1 else torch.float32)
    found = reader(base, models, str(device))
    here = reader(base, models)
    for block in found.layout.blocks:
        there, data = found.read(block), here.read(block)
        assert there.base.device.type == device.type
        assert torch.equal(there.base.cpu(), data.base)
        for task in range(2):
            assert torch.equal(there.models[task].cpu(), data.models[task])


def test_empty_blocks():
    base, models = family(2, shapes={"a.x": (0,), "b.y": (3,)})
    sources = [source(f"m{i}", m) for i, m in enumerate(models)]
    found = BlockReader(layout(base, models), source("base", base), sources)
    assert found.read(found.layout.blocks[0]).base.shape == (0,)
    assert found.read_stored(1, "a.x").numel() == 0
