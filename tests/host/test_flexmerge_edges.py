"""FlexMerges of models that are not alike in every way."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_ext.errors import NonFiniteError
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.io.headers import allowing_pickles
from tests import models as small
from tests.host.flexmerge_models import (
    TASKS,
    Family,
    as_index_says,
    check_blocks,
    copied,
    merge,
    rewrite,
    same,
    tied_family,
)
from tests.reference import flexmerge as naive


def test_a_head_that_is_not_finite_leaves_nothing(tmp_path):
    base, tuned = small.family(tmp_path, small.bert)
    rewrite(tuned[1], lambda s: {**s, "classifier.weight": s["classifier.weight"] * float("nan")})
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError, match=r"classifier\.weight of model tuned1"):
        merge(Family(base, tuned).content(2), out)
    assert not out.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"base", *TASKS}


@pytest.mark.parametrize("others", [None, 1])
def test_what_is_not_merged_is_one_models_in_every_task(families, tmp_path, others):
    family, out = families("vit"), tmp_path / "out"
    base, models = family.states
    given = {} if others is None else {"others": str(family.tuned[others])}
    manifest = merge(family.content(1, include="*.layer.*", exclude="*norm*", **given), out)
    left = {n for n in base if "classifier" not in n and (".layer." not in n or "norm" in n)}
    heads = base.keys() - left - {n for n in base if ".layer." in n}
    assert {tensor.name for tensor in manifest.blocks[-1].tensors} == left
    given_bytes = sum(base[name].nbytes for name in left)
    head_bytes = sum(base[name].nbytes for name in heads) * len(models)
    assert manifest.size.private_bytes == given_bytes + head_bytes
    wanted = {n: torch.stack([m[n].double() for m in models]).mean(0) for n in base.keys() - left}
    wanted |= {name: (base if others is None else models[others])[name] for name in left}
    for task, model in zip(TASKS, models, strict=True):
        expected = wanted | {name: model[name] for name in heads}
        found = dict(open_checkpoint(out, verify=True).tensors(task))
        assert same(as_index_says(out / task), found)
        for name, tensor in found.items():
            exact = {"rtol": 0, "atol": 0} if name in left | heads else {"rtol": 1e-6, "atol": 1e-7}
            torch.testing.assert_close(tensor.double(), expected[name].double(), **exact)


def test_two_models(families, tmp_path):
    family = families("llama")
    two = Family(family.base, family.tuned[:2])
    manifest = merge(two.content(1.4), tmp_path / "out")
    assert manifest.size.models <= 1.4
    check_blocks(tmp_path / "out", two, "average", naive.Options(), 3e-6)


def test_identical_models_and_models_equal_to_the_base(families, tmp_path):
    family = families("llama")
    for task in ("same", "again", "still"):
        shutil.copytree(family.base, tmp_path / task)
    shutil.copytree(family.tuned[0], tmp_path / "copy")
    tuned = [*(tmp_path / task for task in ("same", "again", "still")), family.tuned[0]]
    crowd = Family(family.base, [*tuned, tmp_path / "copy"])
    manifest = merge(crowd.content(2), tmp_path / "out")
    for block in manifest.blocks:
        assert [g.tasks for g in block.groups] == [("same", "again", "still"), ("tuned0", "copy")]
        assert [g.similarity for g in block.groups] == [1.0, 1.0]
    assert same(as_index_says(tmp_path / "out" / "still"), small.state(family.base))
    found = as_index_says(tmp_path / "out" / "copy")
    for name, tensor in small.state(family.tuned[0]).items():
        assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-7)
    # With masks and trimming too.
    for algorithm in ("emr", "consensus", "ties", "tsv_m", "pcb"):
        merge(crowd.content(2.6, algorithm), tmp_path / algorithm)
        checkpoint = open_checkpoint(tmp_path / algorithm, verify=True)
        assert same(dict(checkpoint.tensors("same")), small.state(family.base))


def test_dtypes_that_differ_between_models(families, tmp_path):
    family = copied(families("llama"), tmp_path / "m")
    rewrite(family.tuned[0], lambda s: {n: t.bfloat16() for n, t in s.items()})
    rewrite(family.tuned[2], lambda s: {n: t.double() if "norm" in n else t for n, t in s.items()})
    apart = merge(family.content(3), tmp_path / "apart")
    assert apart.size.models == 3
    for task, path in zip(TASKS, family.tuned, strict=True):
        assert same(as_index_says(tmp_path / "apart" / task), small.state(path))
    merge(family.content(1.9), tmp_path / "out")
    kinds = check_blocks(tmp_path / "out", family, "average", naive.Options(), 3e-6)
    assert "dense" in kinds
    merge(family.content(1.4, "emr", target_size=2.9), tmp_path / "masked")
    check_blocks(tmp_path / "masked", family, "emr", naive.Options(), 3e-6)


def test_tensors_that_are_odd(families, tmp_path):
    family = copied(families("llama"), tmp_path / "m")
    odd = {
        "model.layers.0.mlp.none": torch.zeros(0, 4),
        "model.layers.0.mlp.scalar": torch.tensor(0.5),
        "model.ids": torch.arange(3),
    }
    for folder in (family.base, *family.tuned):
        rewrite(folder, lambda s: {**s, **odd})
        # A class of which nothing is known: what it lacks is not for the check to say.
        path = folder / "config.json"
        path.write_text(path.read_text().replace("LlamaForCausalLM", "OwnModel"))
    for folder in family.tuned[1:]:
        rewrite(folder, lambda s: {n: t for n, t in s.items() if "q_proj" not in n})
    rewrite(family.tuned[2], lambda s: {**s, "lm_head.weight": torch.randn(70, 32)})
    rewrite(family.tuned[2], lambda s: {**s, "model.embed_tokens.weight": torch.randn(70, 32)})
    manifest = merge(family.content(1), tmp_path / "out", out_shard_size=2000)
    assert manifest.size.models == 1
    check_blocks(tmp_path / "out", family, "average", naive.Options(), 3e-6)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    private = {entry.task: {t.name for t in entry.tensors} for entry in manifest.private}
    assert "model.ids" in private["tuned0"] & private["tuned1"] & private["tuned2"]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= private["tuned1"]
    for task, path in zip(TASKS, family.tuned, strict=True):
        assert as_index_says(tmp_path / "out" / task).keys() == small.state(path).keys()
    for file in manifest.files:
        content = load_file(tmp_path / "out" / file.path)
        size = sum(t.numel() * t.element_size() for t in content.values())
        assert size <= 2000 or len([t for t in content.values() if t.numel()]) == 1


def test_sharded_inputs_and_pickles(families, tmp_path):
    source = families("llama")
    family = copied(source, tmp_path / "m")
    wanted = merge(source.content(1.7), tmp_path / "wanted")
    model = transformers.LlamaForCausalLM.from_pretrained(family.tuned[0])
    (family.tuned[0] / "model.safetensors").unlink()
    model.save_pretrained(family.tuned[0], max_shard_size="10KB")
    assert len(list(family.tuned[0].glob("*.safetensors"))) > 2
    state = load_file(family.tuned[1] / "model.safetensors")
    torch.save(state, family.tuned[1] / "pytorch_model.bin")
    (family.tuned[1] / "model.safetensors").unlink()
    with allowing_pickles(True):
        found = merge(family.content(1.7), tmp_path / "found")
    assert [f.sha256 for f in found.files] == [f.sha256 for f in wanted.files]
    assert not list((tmp_path / "found" / "tuned1").glob("*.bin"))
    assert not list((tmp_path / "found" / "tuned0").glob("model.safetensors"))


@pytest.mark.parametrize(
    "twice",
    [(), ("tuned1",), ("base",), TASKS, ("base", "tuned0"), ("base", *TASKS)],
    ids=lambda names: "+".join(names) or "nowhere",
)
@pytest.mark.parametrize(("target", "algorithm"), [(3, "average"), (1.7, "ties"), (1, "average")])
def test_tied_embeddings(twice, target, algorithm, tmp_path):
    """A loader ties what is equal: a copy that is left behind would be a second matrix."""
    family = tied_family(tmp_path, twice)
    given = {"density": 0.3} if algorithm == "ties" else {}
    manifest = merge(family.content(target, algorithm, **given), tmp_path / "out")
    assert manifest.size.models <= target
    assert not manifest.private
    folders = [tmp_path / "out" / task for task in TASKS]
    for folder, path in zip(folders, family.tuned, strict=True):
        found = as_index_says(folder)
        assert found.keys() >= small.state(path).keys()
        one = found["model.embed_tokens.weight"]
        assert torch.equal(found.get("lm_head.weight", one), one)
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, one)
        if target == 3:
            assert torch.equal(one, small.state(path)["model.embed_tokens.weight"])


def test_one_name_of_a_tied_tensor_in_pickles(tmp_path):
    family = tied_family(tmp_path, ("tuned1",))
    path = family.tuned[0] / "model.safetensors"
    torch.save(load_file(path), family.tuned[0] / "pytorch_model.bin")
    path.unlink()
    with allowing_pickles(True):
        merge(family.content(1), tmp_path / "out")
    found = as_index_says(tmp_path / "out" / "tuned0")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_heads_that_are_not_tied_stay_with_their_tasks(tmp_path):
    """One model has unlearned the tie: the others must not be given a second matrix."""
    family = tied_family(tmp_path, ())
    rewrite(family.tuned[1], lambda s: {**s, "lm_head.weight": torch.randn(64, 32)})
    path = family.tuned[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    manifest = merge(family.content(1), tmp_path / "out")
    assert [entry.task for entry in manifest.private] == ["tuned1"]
    assert "lm_head.weight" not in as_index_says(tmp_path / "out" / "tuned0")


@pytest.mark.parametrize("way", ["1", "0"], ids=["while reading", "merged beforehand"])
def test_adapters_on_one_base(way, families, tmp_path, monkeypatch):
    """mergekit's `base+adapter`: tasks go by their adapters' names."""
    monkeypatch.setenv("MERGEKIT_EXT_ADAPTERS", way)
    cache = {} if way == "1" else {"lora_merge_cache": str(tmp_path / "cache")}
    family = families("llama")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM.from_pretrained(family.base)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / name)
    content = small.config(
        "flexmerge",
        [f"{family.base}+{tmp_path / name}" for name in ("one", "two")],
        family.base,
        {"target_size": 1.5, "algorithm": "average"},
    )
    manifest = merge(content, tmp_path / "out", **cache)
    assert [task.name for task in manifest.tasks] == ["one", "two"]
    assert (tmp_path / "cache").exists() == (way == "0")
    found = [as_index_says(tmp_path / "out" / name) for name in ("one", "two")]
    name = "model.layers.0.self_attn.q_proj.weight"
    before = small.state(family.base)
    assert not torch.equal(found[0][name], before[name])
    # Blocks that no adapter touches are alike in both, and shared first.
    apart = {block.name for block in manifest.blocks if len(block.groups) == 2}
    assert apart >= {f"model.layers.{number}.attention" for number in range(3)}
    assert torch.equal(found[1]["lm_head.weight"], before["lm_head.weight"])
