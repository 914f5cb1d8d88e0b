"""Caps hold where inputs take more memory than what is merged of them at once."""

from __future__ import annotations

import json

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peaks import measured
from mergekit_ext import memory
from mergekit_ext.host.checks.pickled import pickled_bytes
from mergekit_ext.host.checks.vocabulary import Vocabulary, vocabulary
from mergekit_ext.host.flexmerge.prepare import check
from mergekit_ext.kernels import footprint
from mergekit_ext.kernels.footprint import Work
from mergekit_ext.kernels.tsv import tsv_merge
from tests import models as small
from tests.host.adapters import saved_adapter
from tests.limits.told import told_by

pytestmark = pytest.mark.skipif(not memory.held(), reason="the system does not tell what is held")
NAMES = (
    "pickles",
    "private tensors",
    "vocabularies",
    "whole tensors",
)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What became of every merge."""
    lines, stderr = told_by("inputs", tmp_path_factory.mktemp("inputs"))
    return {line["name"]: line | {"stderr": stderr} for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_what_inputs_take_is_counted(told, name):
    found = told[name]
    run = found["accepted"]
    assert run["code"] == 0 and found["written"], found["stderr"][-2000:]
    assert run["most"] < found["cap"]
    assert run["most"] - run["before"] >= found["need"] / 2
    assert found["refused"] == 2 and not found["left"]


@pytest.mark.parametrize("shape", [(1, 400_000), (400_000, 2)], ids=["row", "two columns"])
def test_tsv_joins_more_directions_than_a_matrix_has(shape):
    deltas = [torch.randn(shape) for _ in range(12)]
    threads = torch.get_num_threads()
    run = measured(lambda: (torch.set_num_threads(1), tsv_merge(deltas)))
    assert torch.get_num_threads() == threads and run.code == 0
    need = sum(footprint.tsv(Work(shape, len(deltas))).values())
    assert need / 2 < run.added < need + (32 << 20)  # that the allocator keeps


def test_what_an_adapter_changes_is_counted_and_nothing_else(tmp_path):
    base = tmp_path / "base"
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
    fields = LlamaConfig(vocab_size=64, num_attention_heads=4, **shape)
    LlamaForCausalLM(fields).to(torch.bfloat16).save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["down_proj"])
    sources = [
        saved_adapter(base, tmp_path / f"lora{seed}", lora, seed, LlamaForCausalLM)
        for seed in range(2)
    ]
    parameters = {"target_size": 1, "algorithm": "average", "granularity": "tensor"}
    models = [f"{base}+{source}" for source in sources]
    content = small.config("flexmerge", models, base, parameters)
    report, prepared = check(MergeConfiguration.model_validate(content), MergeOptions())
    assert prepared.adapted and all("down_proj" in name for name in prepared.adapted)
    need = report.estimate.need
    assert "down_proj" in need.what
    # Before and after in float32, and three masks; the base's own tensor is mapped.
    assert need.parts["a tensor with its adapter"] == 512 * 2048 * 11


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
