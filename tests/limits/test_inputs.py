"""What inputs take in memory: whole pickles, and the vocabulary of a tokenizer that is built."""

from __future__ import annotations

import json

import pytest
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ext.host.checks.estimate import pickled_bytes, vocabulary
from tests import models as small


def test_the_largest_file_of_each_model_counts_once(tmp_path):
    for name, size in {"one": 5, "two": 7, "three": 3}.items():
        (tmp_path / f"{name}.bin").write_bytes(b"x" * size)
    shards = {"a": "one.bin", "b": "two.bin", "c": "three.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    single = tmp_path / "single"
    single.mkdir()
    (single / "pytorch_model.bin").write_bytes(b"x" * 11)
    references = [str(tmp_path), f"{tmp_path}+one", f"{tmp_path}+other", str(single)]
    models = [ModelReference.parse(reference) for reference in references]
    assert pickled_bytes(models, MergeOptions()) == 7 + 11
    assert pickled_bytes(models, MergeOptions(lazy_unpickle=True)) == 0
    (single / "model.safetensors").touch()  # which the loader prefers
    assert pickled_bytes(models, MergeOptions()) == 7


def found(folder, contents, **tokenizer):
    """The vocabulary of a merge of models with these tokenizers, of which the first is the base."""
    for name, content in contents.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(content)
    base, *tuned = (folder / name for name in contents)
    config = small.config("nan", tuned, base, tokenizer=tokenizer)
    return vocabulary(MergeConfiguration.model_validate(config), MergeOptions())


@pytest.mark.parametrize(
    ("contents", "source", "most"),
    [("xy", "union", 7), ("xx", "union", 4), ("xy", "base", 4)],
    ids=["joined", "the same", "of one"],
)
def test_rows_of_a_vocabulary(contents, source, most, tmp_path):
    rows, _ = found(tmp_path, dict(zip("ab", contents, strict=True)), source=source)
    assert rows([3, 4]) == most


def test_rows_that_are_added(tmp_path):
    tokens = {"new": {"source": str(tmp_path / "a")}}
    given = {"source": "base", "tokens": tokens, "pad_to_multiple_of": 8}
    rows, size = found(tmp_path, {"a": "x" * 1000, "b": "y"}, **given)
    assert rows([16]) >= 24 and size > 2 * 1000
