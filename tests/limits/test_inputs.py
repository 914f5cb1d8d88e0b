"""What inputs take in memory: whole pickles, and the vocabulary of a tokenizer that is built."""

from __future__ import annotations

import json
import shutil

import pytest
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ext.host.checks.estimate import pickled_bytes
from mergekit_ext.host.checks.merge import check_merge
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base with the words w0 to w63, a model with w32 to w95, and a folder of 500 other words."""
    folder = tmp_path_factory.mktemp("pair")
    base, (tuned,) = small.family(folder, small.llama, amounts=(0.01,))
    small.tokenizer(base)
    small.tokenizer(tuned, [f"w{i}" for i in range(32, 96)])
    small.tokenizer(folder / "words", map(str, range(500)))
    return base, tuned


def report_of(pair, **keys):
    base, tuned = pair
    config = MergeConfiguration.model_validate(small.config("nan", [tuned], base, **keys))
    return check_merge(config, MergeOptions())[0]


@pytest.mark.parametrize(
    ("source", "more", "rows"),
    [
        ("union", {}, 96),
        ("base", {}, 64),
        ("union", {"tokens": ["new"], "pad_to_multiple_of": 64}, 128),
        ("words", {}, 500),
    ],
    ids=["joined", "of one", "added", "a model that is not merged"],
)
def test_rows_of_a_built_vocabulary(source, more, rows, pair):
    base, _ = pair
    if "tokens" in more:
        more = {**more, "tokens": {name: {"source": str(base)} for name in more["tokens"]}}
    if source == "words":
        source = str(base.parent / source)
    plain = report_of(pair).estimate
    built = report_of(pair, tokenizer={"source": source, **more}).estimate
    moved = 2 * 32 * (rows - 64)  # embeddings and head
    assert built.parameters - plain.parameters == moved
    assert built.bytes_written - plain.bytes_written == 4 * moved
    assert built.need.parts["tokenizers"] > 2 * (base / "tokenizer.json").stat().st_size


def test_the_largest_vocabulary_counts_where_none_is_known(pair):
    report = report_of(pair, tokenizer_source="org/elsewhere")
    assert report.problems == ()
    assert report.estimate.parameters == report_of(pair).estimate.parameters


def test_tokenizers_that_cannot_be_read_are_problems(pair, tmp_path):
    models = [shutil.copytree(model, tmp_path / model.name) for model in pair]
    for model in models:
        (model / "tokenizer.json").unlink()
        (model / "tokenizer.json").symlink_to("/proc/self/mem")
    report = report_of(models, tokenizer_source="union")
    assert {problem.where for problem in report.problems} == {"base_model", "models[0].model"}
