"""Every dtype that a file can hold: merged, copied, or refused before a weight is read."""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mergekit_ext.errors import CheckpointError
from mergekit_ext.flexmerge.files import StoredFile
from mergekit_ext.flexmerge.manifest import ShardFile
from mergekit_ext.io.headers import BITS, NARROW, PACKED
from tests.attacks.readers import command, copied, llama
from tests.attacks.weights import joined, split
from tests.models import config, family, write_yaml

NAME = "model.layers.0.mlp.down_proj.weight"
PARAMETERS = {
    "nan_ties": {"density": 0.5},
    "linear": {"weight": 1.0},
    "flexmerge": {"target_size": 1.5},
}
MODELS = ("base", "tuned0", "tuned1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtypes")
    family(folder, llama, amounts=(0.01, 0.02))
    return folder


def stored_as(model: Path, dtype: str, pattern: bytes, name: str = NAME) -> None:
    """Give a model's tensor another dtype, and bytes that repeat `pattern`."""
    file = model / "model.safetensors"
    header, data = split(file.read_bytes())
    content, body = {}, b""
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = data[begin:end]
            if key == name:
                size = math.prod(entry["shape"]) * BITS[dtype] // 8
                entry["dtype"], raw = dtype, (pattern * size)[:size]
            content[key] = {**entry, "data_offsets": [len(body), len(body) + len(raw)]}
            body += raw
    file.write_bytes(joined({"__metadata__": {"format": "pt"}, **content}, body))


def run(words, folder, method, out=None, **keys):
    models = [folder / name for name in MODELS[1:]]
    text = config(method, models, None if method == "linear" else folder / "base")
    text |= {"parameters": PARAMETERS[method], **keys}
    place = [] if out is None else [out, "--quiet"]
    return command("mergekit-ext", words, write_yaml(folder / "merge.yml", text), *place)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_what_can_be_converted_is_taken(dtype, sound, tmp_path):
    folder = copied(sound, tmp_path / "in")
    for model in MODELS:
        stored_as(folder / model, dtype, b"\1")
    plain = run("check", folder, "nan_ties")
    assert plain.code == (2 if dtype in NARROW else 0), plain.text
    converted = run("check", folder, "nan_ties", dtype="bfloat16")
    assert converted.code == (2 if dtype in PACKED else 0), converted.text
    flexmerge = run("check", folder, "flexmerge")
    assert flexmerge.code == (2 if dtype in PACKED else 0), flexmerge.text
    for outcome in (plain, converted, flexmerge):
        if outcome.code:
            assert dtype in outcome.text and NAME in outcome.text
            assert ("dtype: bfloat16" in outcome.text) == (dtype not in PACKED)


def test_float64_is_merged(sound, tmp_path):
    folder = copied(sound, tmp_path / "in")
    for model in MODELS:
        stored_as(folder / model, "F64", struct.pack("<d", 0.25))
    outcome = run("merge", folder, "nan_ties", tmp_path / "out")
    assert outcome.code == 0, outcome.text
    (file,) = (tmp_path / "out").glob("*.safetensors")
    merged = load_file(file)[NAME]
    assert str(merged.dtype) == "torch.float64" and bool((merged == 0.25).all())


COPIED = {
    "integers": ("I64", [struct.pack("<q", i) for i in range(3)], "have no mean"),
    "complex": ("C64", [struct.pack("<2f", 1, i) for i in range(3)], "differs between inputs"),
    "complex NaN": ("C64", [struct.pack("<2f", math.nan, 0)] * 3, "differs between inputs"),
}


@pytest.mark.parametrize("method", ["nan_ties", "linear"])
@pytest.mark.parametrize("case", COPIED)
def test_what_has_no_mean_must_be_the_same(case, method, sound, tmp_path):
    dtype, patterns, found = COPIED[case]
    folder = copied(sound, tmp_path / "in")
    for model, pattern in zip(MODELS, patterns, strict=True):
        stored_as(folder / model, dtype, pattern)
    outcome = run("merge", folder, method, tmp_path / "out")
    assert outcome.code == 2 and NAME in outcome.text and found in outcome.text
    assert [place.name for place in tmp_path.iterdir()] == ["in"]


def test_a_checkpoint_with_a_dtype_that_torch_lacks_is_refused(tmp_path):
    entry = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    content = joined({"__metadata__": {"format": "pt"}, "w": entry}, bytes(3))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    shard = ShardFile(
        path="shards/a.safetensors", kind="dense", tasks=("t",), bytes=len(content), sha256=digest
    )
    stored = StoredFile(tmp_path.resolve(), shard)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: w: found .*F6_E2M3"):
        stored.tensor("w")
