"""`algorithm: residual` from YAML: checkpoints, what is refused, what goes on after a stop."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_ext import flexmerge
from mergekit_ext.errors import NonFiniteError
from mergekit_ext.flexmerge.manifest import read_manifest
from mergekit_ext.flexmerge.reader import export, open_checkpoint
from tests.host.flexmerge_models import TASKS, copied, digests, merge, rewrite
from tests.host.test_flexmerge_checks import report_of
from tests.reference import residual as naive

BASES = {
    "average": lambda base, models: sum(models) / len(models),
    "given": lambda base, models: base,
    "task_arithmetic": lambda base, models: base + 1.5 * sum(m - base for m in models) / 3,
}


def is_matrix(tensor, stacked):
    rows, columns = naive.matrices(tensor, stacked).shape[1:] if tensor.dim() > 1 else (1, 1)
    return rows * columns > rows + columns


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_each_task_is_a_base_and_its_leading_triplets(name, base, families, tmp_path):
    family, out = families(name), tmp_path / "out"
    merge(family.content(1.6, "residual", base=base), out)
    start, models = family.states
    manifest = read_manifest(out)
    assert manifest.size.models <= 1.6
    checkpoint = open_checkpoint(out, verify=True)
    for block in manifest.blocks:
        (group,) = block.groups
        assert group.kind == "residual"
        for tensor in block.tensors:
            key = tensor.name
            theta_0 = BASES[base](start[key].double(), [m[key].double() for m in models])
            for task, model in zip(TASKS, models, strict=True):
                expected = model[key].double()
                stacked = key in group.stacked
                if is_matrix(expected, stacked):
                    rank = group.ranks[task].get(key, 0)
                    expected = naive.restored(model[key], theta_0, rank, stacked)
                found = checkpoint.tensors(task)[key].double()
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_tasks_load_and_are_exported_alike(families, tmp_path):
    family, out = families("llama"), tmp_path / "out"
    merge(family.content(1.5, "residual"), out)
    export(out, TASKS[1], tmp_path / "one")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        logits = flexmerge.load(out, TASKS[1])(ids).logits
        torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        merged = flexmerge.load(out, TASKS[1], merged=True)(ids).logits
        assert torch.equal(merged, plain(ids).logits)
        assert not torch.allclose(logits, flexmerge.load(out, TASKS[0])(ids).logits)


def test_more_bytes_are_never_worse(families, tmp_path):
    family = families("bert")
    _, models = family.states
    errors = []
    for size in (1.2, 1.5, 2.0, 2.9, 3.0):
        out = tmp_path / f"{size}"
        merge(family.content(size, "residual"), out)
        checkpoint = open_checkpoint(out)
        errors.append(
            sum(
                float((tensor.double() - model[name].double()).square().sum())
                for task, model in zip(TASKS, models, strict=True)
                for name, tensor in checkpoint.tensors(task).items()
            )
        )
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0


@pytest.mark.parametrize("name", ["vectors", "embeddings"])
def test_what_is_shared_is_the_bases(name, families, tmp_path):
    family, out = families("llama"), tmp_path / "out"
    merge(family.content(1.4, "residual", **{name: "shared"}), out)
    _, models = family.states
    key = {"vectors": "model.norm.weight", "embeddings": "model.embed_tokens.weight"}[name]
    mean = sum(model[key].double() for model in models) / 3
    for task in TASKS:
        found = open_checkpoint(out).tensors(task)[key]
        torch.testing.assert_close(found, mean.to(found.dtype))


def test_ranks_keep_to_their_bounds(families, tmp_path):
    family, out = families("llama"), tmp_path / "out"
    merge(family.content(2.0, "residual", max_rank=6, rank_multiple=2), out)
    groups = [group for block in read_manifest(out).blocks for group in block.groups]
    ranks = {rank for g in groups for own in g.ranks.values() for rank in own.values()}
    assert ranks <= {2, 4, 6} and 6 in ranks


@pytest.mark.parametrize(
    ("given", "where", "words"),
    [
        ({"target_size": 1.0}, "parameters.target_size", "can be reached: 1."),
        ({"base": "flexmerge"}, "parameters.base", "'average'"),
        ({"vectors": "low_rank"}, "parameters.vectors", "'own' or 'shared'"),
        ({"max_rank": 0}, "parameters.max_rank", "greater than or equal to 1"),
        ({"density": 0.2}, "parameters.density", ""),
        ({"linkage": "max"}, "parameters.linkage", "nothing"),
        ({"base": "given", "dare_density": 0.5}, "parameters.dare_density", "nothing"),
        ({"rank": 4}, "parameters", "one of target_size, rank, energy"),
        ({"target_size": None}, "parameters", "one of target_size, rank, energy"),
        ({"base": "slerp", "t": 0.5}, "parameters.base", "groups of up to 3 models"),
        ({"weight": 0.0}, "parameters.weight", "a sum other than 0"),
        ({"granularity": "model", "embeddings": "own"}, "parameters.embeddings", "`low_rank`"),
        ({"max_rank": 12, "rank_multiple": 8}, "parameters.max_rank", "a multiple"),
        ({"rank_multiple": 64}, "parameters.rank_multiple", "at most 32"),
    ],
)
def test_what_cannot_be_is_refused_beforehand(given, where, words, families):
    content = families("llama").content(1.5, "residual")
    parameters = {**content["parameters"], **given}
    content["parameters"] = {n: v for n, v in parameters.items() if v is not None}
    (problem,) = report_of(content).problems
    assert problem.where == where and words in problem.expected


@pytest.mark.parametrize(
    ("algorithm", "given"),
    [("average", {}), ("ties", {}), ("residual", {}), ("residual", {"base": "ties"})],
)
def test_parameters_are_in_effect_that_are_not_refused(algorithm, given, families, tmp_path):
    content, out = families("llama").content(2.0, algorithm, **given), tmp_path / "out"
    merge(content, out)
    line = (out / "README.md").read_text().rpartition("### Parameters in effect")[2]
    for name, value in {"linkage": "max", "order": "random", "similarity_on": "trimmed"}.items():
        changed = {**content, "parameters": {**content["parameters"], name: value}}
        assert (f" {name} " in line) == (not report_of(changed).problems)


def test_one_rank_for_all(families, tmp_path):
    out = tmp_path / "out"
    content = families("llama").content(None, "residual", rank=3)
    del content["parameters"]["target_size"]
    merge(content, out)
    groups = [group for block in read_manifest(out).blocks for group in block.groups]
    assert {rank for g in groups for own in g.ranks.values() for rank in own.values()} == {3}


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_a_share_of_the_squared_norms_is_kept(energy, families, tmp_path):
    family, out = families("bert"), tmp_path / "out"
    content = family.content(None, "residual", energy=energy)
    del content["parameters"]["target_size"]
    merge(content, out)
    checkpoint, (_, models) = open_checkpoint(out), family.states
    whole = left = 0.0
    for block in checkpoint.manifest.blocks:
        names = {name for own in block.groups[0].ranks.values() for name in own}
        for name in names:
            theta_0 = sum(model[name].double() for model in models) / 3
            for task, model in zip(TASKS, models, strict=True):
                whole += float((model[name].double() - theta_0).square().sum())
                found = checkpoint.tensors(task)[name].double()
                left += float((model[name].double() - found).square().sum())
    assert energy <= 1 - left / whole < energy + 0.02
    assert "asks for more" not in (out / "README.md").read_text()


def test_a_share_that_ranks_do_not_hold_is_said(families, tmp_path):
    content = families("bert").content(None, "residual", energy=0.95, max_rank=1)
    del content["parameters"]["target_size"]
    merge(content, tmp_path / "out")
    said = (tmp_path / "out" / "README.md").read_text()
    assert "`max_rank: 1` keeps 0." in said and "`energy: 0.95` asks for more" in said


def test_parameters_of_the_bases_method_are_taken(families):
    content = families("llama").content(1.5, "residual", base="ties", density=0.2)
    assert not report_of(content).problems


def test_the_same_bytes_after_a_stop(families, tmp_path, monkeypatch):
    family = families("llama")
    content = family.content(1.5, "residual")
    merge(content, tmp_path / "whole")
    made = []

    def stop(*given, **named):
        made.append(given)
        if len(made) == 4:
            raise OSError("no space")
        return stock(*given, **named)

    from mergekit_ext.flexmerge import decomposition

    stock = decomposition.save_file
    monkeypatch.setattr(decomposition, "save_file", stop)
    with pytest.raises(Exception, match="no space"):
        merge(content, tmp_path / "out")
    merge(content, tmp_path / "out")
    tensors = sum(len(block.tensors) for block in read_manifest(tmp_path / "out").blocks)
    assert len(made) <= tensors + 1
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_nan_stops_the_merge(name, families, tmp_path):
    family = copied(families("llama"), tmp_path / "models")

    def spoil(state):
        state[name].view(-1)[3] = math.nan
        return state

    rewrite(family.tuned[1], spoil)
    with pytest.raises(NonFiniteError, match=name):
        merge(family.content(1.5, "residual"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_are_the_base_take_no_ranks(families, tmp_path):
    family, out = copied(families("llama"), tmp_path / "models"), tmp_path / "out"
    for folder in family.tuned:
        shutil.copy(family.base / "model.safetensors", folder)
    merge(family.content(1.5, "residual", base="given"), out)
    groups = [group for block in read_manifest(out).blocks for group in block.groups]
    assert not any(ranks for group in groups for ranks in group.ranks.values())


def test_factors_are_read_from_files_alone(families, tmp_path):
    out = tmp_path / "out"
    merge(families("vit").content(1.5, "residual"), out)
    factors = load_file(next((out / "shards").glob("factors-*.safetensors")))
    assert {name.rpartition(".")[2] for name in factors} == {"lora_A", "lora_B"}
    assert not (out / "residuals").exists()
