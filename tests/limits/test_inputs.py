"""What inputs take in memory: whole pickles, and the vocabulary of a tokenizer that is built."""

from __future__ import annotations

import json

import pytest
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ext.host.checks.loaders import Vocabulary, pickled_bytes, vocabulary
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


TOKENS = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<s>"}]}
UNIGRAM = {"model": {"vocab": [["a", -1.0], ["c", -2.0], ["d", -3.0]]}}


def found(folder, first, second, **tokenizer):
    for name, content in (("x", first), ("y", second)):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
    content = small.config("nan", [folder / "y"], folder / "x", tokenizer=tokenizer)
    return vocabulary(MergeConfiguration.model_validate(content), MergeOptions())


def test_tokens_are_counted_once(tmp_path):
    tokens = {"b": {"source": str(tmp_path / "x")}, "new": {"source": str(tmp_path / "x")}}
    union = found(tmp_path, TOKENS, UNIGRAM, source="union", tokens=tokens, pad_to_multiple_of=4)
    assert union.rows == 8  # a, b, <s>, c, d, new
    assert union.bytes > 2 * len(json.dumps(UNIGRAM))


def test_the_base_decides_alone(tmp_path):
    assert found(tmp_path, TOKENS, UNIGRAM, source="base").rows == 3


@pytest.mark.parametrize(
    "broken",
    ["", "[]", '{"model": {"vocab": [1]}}', "[" * 100_000, '{"model": {"vocab": [[1]]}}'],
    ids=["empty", "list", "numbers", "deep", "no text"],
)
def test_files_that_cannot_be_counted_give_bounds(tmp_path, broken):
    union = found(tmp_path, TOKENS, broken, source="union")
    assert union.rows is None
    assert (union.at_least([3, 4]), union.at_most([3, 4])) == (4, 7)


def test_bounds_where_one_model_decides():
    known = Vocabulary(None, joined=False, bytes=0)
    assert known.at_least([3, 4]) == known.at_most([3, 4]) == 4
