"""Tensors that do not fit, and what a merge of those that fit will cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_ext.host.checks import estimate
from mergekit_ext.host.checks.merge import check_merge
from tests.host.small import LINEAR, at, entries, run, the


@pytest.mark.parametrize("kind", ["", "bert_", "t5_"])
def test_fine_merge_has_no_problem_and_the_right_estimate(models: Path, kind: str) -> None:
    report = run({**LINEAR, "models": entries(models, f"{kind}a", f"{kind}b")})
    assert report.problems == ()
    stored = [load_file(models / f"{kind}{x}" / "model.safetensors") for x in "ab"]
    size = sum(tensor.numel() for tensor in stored[0].values())
    assert report.estimate is not None
    assert report.estimate.bytes_read == 2 * size * 4
    assert report.estimate.parameters >= size  # a tied weight is written under each of its names
    assert report.estimate.bytes_written == report.estimate.parameters * 4
    largest = max(tensor.numel() for tensor in stored[0].values())
    copies = 1 + 8 * 2 + 6 + 2 * 2 + 16  # `memory.working`
    assert report.estimate.bytes_held == largest * 4 * copies


def test_how_long_a_solver_takes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_SHORT", 0.0)
    shared = {"models": entries(models, *"abc"), "parameters": {"mu_relative": 0.1}}
    found = run({**shared, "merge_method": "lore"}).estimate
    assert found is not None and 0 < found.seconds_of_embeddings < found.seconds
    assert found.time == "about 1 min on this CPU, 1 min of it for embeddings"
    plain = run({**shared, **LINEAR}).estimate
    assert plain is not None and plain.time == ""


def test_estimate_follows_dtypes_and_shards(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "half", "a"), "out_dtype": "bfloat16"}
    report = run(document, out_shard_size=1000)
    assert report.problems == () and report.estimate is not None
    count = sum(t.numel() for t in load_file(models / "a" / "model.safetensors").values())
    assert report.estimate.bytes_read == count * 6
    assert report.estimate.bytes_written == count * 2
    # The result, the method's copies and pieces, and one input as it is stored and converted.
    assert report.estimate.bytes_held == 64 * 16 * (2 + 4 * (22 + 20) + 2 + 4)
    assert any("BF16, F32" in note for note in report.notes)


def test_stock_slerp_with_slices_gradients_and_filters(models: Path) -> None:
    sources = [{"model": str(models / name), "layer_range": [0, 2]} for name in "ab"]
    report = run(
        {
            "merge_method": "slerp",
            "base_model": str(models / "a"),
            "slices": [{"sources": sources}],
            "parameters": {
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 1]},
                    {"filter": "mlp", "value": [1, 0.5, 0]},
                    {"value": 0.5},
                ]
            },
            "dtype": "bfloat16",
        }
    )
    assert report.problems == () and report.notes == ()


def test_sharded_models_and_the_configuration_is_left_alone(models: Path) -> None:
    config = MergeConfiguration.model_validate(
        {**LINEAR, "models": entries(models, "sharded", "a")}
    )
    before = config.model_copy(deep=True)
    assert check_merge(config, MergeOptions())[0].problems == ()
    assert config == before


@pytest.mark.only_checked("reading is forbidden")
def test_no_weight_is_read_and_no_cache_is_filled(
    models: Path, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(LoaderCache, "get", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    before = dict(LoaderCache.loaders)
    assert run({**LINEAR, "models": entries(models, "a", "b")}).problems == ()
    assert LoaderCache.loaders == before


def test_missing_tensors_are_grouped(models: Path, copy: Callable[..., Path]) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "mlp" in name]:
            del tensors[name]

    folder = copy("a", drop)
    problem = the(run({**LINEAR, "models": entries(models, folder, "b")}))
    assert problem.found.startswith("6 tensors (model.layers.0.mlp.")
    assert problem.where == "models[0].model" and f"missing in {folder}" in problem.found


def test_vocabularies_that_differ(models: Path) -> None:
    document = {**LINEAR, "models": entries(models, "a", "large_vocab")}
    problem = the(run(document))
    assert "model.embed_tokens.weight" in problem.where and "lm_head.weight" in problem.where
    assert "[64, 16]" in problem.found and "[72, 16]" in problem.found
    assert "tokenizer:" in problem.remedy and "--unsafe-truncate-embeddings" in problem.remedy
    assert run(document, unsafe_truncate_embeddings=True).problems == ()
    assert run({**document, "tokenizer": {"source": "union"}}).problems == ()


def test_other_shapes_that_differ(models: Path) -> None:
    report = run({**LINEAR, "models": entries(models, "a", "wide")})
    up = next(problem for problem in report.problems if "mlp.up_proj" in problem.where)
    assert up.where.startswith("4 tensors (model.layers.0.mlp.")
    assert f"[24, 16] in {models / 'a'}, [48, 16] in {models / 'wide'}" in up.found
    assert up.remedy == "Take out the models that do not fit."
    assert len(report.problems) == 2  # the transposed shapes of down_proj are the other


def test_integers_and_float8(models: Path, copy: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    document = {**LINEAR, "models": entries(models, copy("a", change), "b")}
    report = run(document)
    assert "I32 in" in at(report, "model.norm.weight").found
    assert "dtype: bfloat16" in at(report, "lm_head.weight").remedy
    assert run({**document, "dtype": "bfloat16"}).problems == ()


def test_optional_tensor_that_only_some_models_have(
    models: Path, copy: Callable[..., Path]
) -> None:
    # A head may be read as the tied embedding, which every model has.
    tied = {"merge_method": "nuslerp", "models": entries(models, "a", "tied", weight=1)}
    assert run(tied).problems == ()

    name = "bert.embeddings.position_ids"
    folder = copy("bert_b", lambda tensors: tensors.update({name: torch.arange(32)[None]}))
    document = {"base_model": str(models / "bert_a"), "models": entries(models, folder, weight=1)}
    problem = the(run({**document, "merge_method": "ties"}))
    assert problem.where == name and str(models / "bert_a") in problem.found
    assert "Base input is not present" in problem.found
    del document["models"][0]["parameters"]
    parameters = {"t": 0.5}
    assert run({**document, "merge_method": "slerp", "parameters": parameters}).problems == ()


def test_slices(models: Path) -> None:
    def source(name: str, first: int, last: int) -> dict[str, Any]:
        return {"model": str(models / name), "layer_range": [first, last]}

    report = run(
        {
            **LINEAR,
            "slices": [
                {"sources": [source("a", 0, 2), source("deep", 2, 3)]},
                {"sources": [source("a", 1, 5), source("b", 0, 4)]},
                {"sources": [source("a", 0, 1), source("nowhere", 0, 1)]},
            ],
        }
    )
    assert "2 of" in at(report, "slices[0]").found and "1 of" in at(report, "slices[0]").found
    assert "[0, 2]" in at(report, "slices[1].sources[0].layer_range").expected
    assert at(report, "slices[2].sources[1].model").found.endswith("does not exist")


def test_models_of_different_depth(models: Path) -> None:
    problem = the(run({**LINEAR, "models": entries(models, "a", "deep")}))
    assert problem.where == "models" and "slices:" in problem.remedy


def test_unknown_module(models: Path) -> None:
    inner = {"models": entries(models, "t5_a", "t5_b")}
    report = run({**LINEAR, "modules": {"encoder": inner, "decodr": inner}})
    assert at(report, "modules.decodr").remedy == "Write `decoder`."
    assert any("no weights of decoder" in note for note in report.notes)


@pytest.mark.only_checked("transformers cannot build the class")
def test_all_tensors_of_a_class_that_cannot_be_built_are_merged(copy: Callable[..., Path]) -> None:
    extra = {"bert.extra.weight": torch.zeros(2)}
    folder = copy("bert_a", lambda tensors: tensors.update(extra), num_attention_heads=5)
    report = run({**LINEAR, "models": [{"model": str(folder)}]})
    assert report.problems == () and report.estimate is not None
    assert report.estimate.tensors == len(load_file(folder / "model.safetensors"))
