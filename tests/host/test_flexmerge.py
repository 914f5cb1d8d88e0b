"""`merge_method: flexmerge` on real small models: groups, values, sizes."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
import transformers
import yaml
from transformers import (
    PreTrainedModel,
)

import mergekit_ext
from tests import models as small
from tests.host.flexmerge_models import (
    MAKERS,
    QUIET,
    TASKS,
    Family,
    as_index_says,
    check_blocks,
    cuts_of,
    merge,
    on_disk,
    same,
)
from tests.reference import flexmerge as naive

DTYPES = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7}


CASES = [*((name, torch.float32) for name in MAKERS), ("llama", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_all_apart_is_the_inputs_themselves(name, dtype, families, tmp_path):
    family = families(name, dtype)
    manifest = merge(family.content(3), tmp_path / "out")
    assert manifest.size.models == 3
    for task, path in zip(TASKS, family.tuned, strict=True):
        assert same(as_index_says(tmp_path / "out" / task), small.state(path))
        for file in path.iterdir():
            if file.suffix == ".json" and "index" not in file.name:
                assert (tmp_path / "out" / task / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_in_between_every_block_is_f_of_its_group(name, dtype, families, tmp_path):
    family = families(name, dtype)
    merge(family.content(2, "task_arithmetic"), tmp_path / "out")
    given = naive.Options(1.5)
    kinds = check_blocks(tmp_path / "out", family, "task_arithmetic", given, DTYPES[dtype])
    assert kinds == {"alone", "dense"}


@pytest.mark.parametrize(
    ("algorithm", "parameters", "method", "given"),
    [
        ("average", {"weight": 1.0}, "linear", {}),
        ("task_arithmetic", {"lambda": 1.2}, "task_arithmetic", {"weight": 1.2 / 3}),
        (
            *("ties", {"density": 0.3, "lambda": 0.9, "trim_scope": "tensor"}),
            *("ties", {"density": 0.3, "lambda": 0.9}),
        ),
    ],
)
def test_size_one_is_mergekits_own_method(algorithm, parameters, method, given, tmp_path):
    base, tuned = small.family(tmp_path, small.bert)
    out, stock = tmp_path / "out", tmp_path / "stock"
    merge(Family(base, tuned).content(1, algorithm, heads="merged", **parameters), out)
    based = None if method == "linear" else base
    content = small.config(method, tuned, based, {"weight": 1.0, **given})
    mergekit_ext.merge(yaml.safe_dump(content), stock, QUIET)
    wanted = small.state(stock)
    for folder in (out, *(out / task for task in TASKS)):
        found = as_index_says(folder)
        assert found.keys() == wanted.keys()
        for tensor, value in wanted.items():
            assert torch.allclose(found[tensor], value, rtol=1e-5, atol=1e-6), tensor


ALGORITHMS = {
    "average": ({}, naive.Options()),
    "ties": ({"density": 0.3, "trim_scope": "block"}, naive.Options(1.0, None, [0.3] * 3)),
    "pcb": (
        {"density": 0.3, "trim_scope": "tensor", "lambda": 0.8},
        naive.Options(0.8, None, [0.3] * 3, "tensor"),
    ),
    "tsv_m": ({}, naive.Options()),
    "iso_cts": ({}, naive.Options()),
    "nan": ({"scale": "paper"}, naive.Options()),
    "consensus": ({"trim_scope": "block"}, naive.Options(1.0, None, [0.1] * 3)),
    "emr": ({}, naive.Options()),
    "channel_merging": ({}, naive.Options(1.5)),
}


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_algorithms(algorithm, families, tmp_path):
    family = families("vit")
    parameters, given = ALGORITHMS[algorithm]
    masks = algorithm in ("emr", "consensus")
    target = 2.5 if masks else 2
    manifest = merge(family.content(target, algorithm, **parameters), tmp_path / "out")
    assert manifest.size.models <= target
    tolerance = 3e-5 if algorithm in ("tsv_m", "iso_cts") else 5e-6
    kinds = check_blocks(tmp_path / "out", family, algorithm, given, tolerance)
    assert ("masked" if masks else "dense") in kinds


@pytest.mark.parametrize("algorithm", ["ties", "pcb", "consensus"])
def test_trimming_whole_models(algorithm, families, tmp_path):
    family = families("llama")
    target = 2.5 if algorithm == "consensus" else 1
    manifest = merge(family.content(target, algorithm, density=0.2), tmp_path / "out")
    cuts = cuts_of(manifest, *family.states, 0.2)
    given = naive.Options(1.0, None, [0.2] * 3, "model", cuts)
    check_blocks(tmp_path / "out", family, algorithm, given, 5e-6)


@pytest.mark.parametrize("similarity_on", ["original", "trimmed"])
@pytest.mark.parametrize("granularity", ["component", "layer", "tensor", "model"])
def test_groups_are_those_of_algorithm_1(granularity, similarity_on, families, tmp_path):
    family = families("llama")
    content = family.content(
        2.2, "ties", density=0.05, similarity_on=similarity_on, granularity=granularity
    )
    manifest = merge(content, tmp_path / "out")
    base, models = family.states
    given = naive.Options(1.0, None, [0.05] * 3, "model", cuts_of(manifest, base, models, 0.05))
    cosines, blocks = [], []
    for block in manifest.blocks:
        names = [t.name for t in block.tensors]
        deltas = [[naive.delta(m[n], base[n]) for n in names] for m in models]
        if similarity_on == "trimmed":
            deltas = naive.trimmed(deltas, given)
        cosines.append(naive.cosine_matrix([naive.laid_out(parts) for parts in deltas]))
        blocks.append(naive.Stored(sum(base[n].numel() for n in names), [4] * 3))
    unit = sum(block.elements * 4 for block in blocks)
    groups, sizes = naive.algorithm_1(cosines, blocks, 2.2 * unit)
    assert [
        [tuple(TASKS.index(t) for t in g.tasks) for g in b.groups] for b in manifest.blocks
    ] == [sorted(found) for found in groups]
    assert manifest.size.bytes == sizes[-1]
    count = {"component": 15, "layer": 6, "tensor": len(base), "model": 1}[granularity]
    assert len(manifest.blocks) == count


def test_sizes_on_disk(tmp_path):
    """Of models whose headers do not matter."""

    def wider() -> PreTrainedModel:
        config = small.llama().config
        config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
        return transformers.LlamaForCausalLM(config)

    base, tuned = small.family(tmp_path, wider)
    family = Family(base, tuned)
    for target in (3, 1.6, 1):
        out = tmp_path / f"out{target}"
        manifest = merge(family.content(target), out)
        assert on_disk(out) == pytest.approx(manifest.size.bytes, rel=0.01)
        assert manifest.size.models == pytest.approx(
            manifest.size.bytes / manifest.size.unit_bytes, rel=1e-9
        )
        assert manifest.size.models <= target
        if target == 1.6:  # the best fit, within the largest block
            assert manifest.size.models > target - 0.35
        blocks = subprocess.run(
            ["du", "-s", "--block-size=1", out], capture_output=True, text=True, check=True
        )
        assert int(blocks.stdout.split()[0]) < manifest.size.bytes * 1.01 + 300_000
    masked = merge(family.content(2.5, "emr"), tmp_path / "masked")
    assert on_disk(tmp_path / "masked") == pytest.approx(masked.size.bytes, rel=0.01)


def test_a_dtype_for_the_output(families, tmp_path):
    family = families("llama")
    content = {**family.content(1.6), "dtype": "bfloat16"}
    manifest = merge(content, tmp_path / "out")
    assert manifest.size.models <= 1.6
    for task in TASKS:
        found = as_index_says(tmp_path / "out" / task)
        assert {t.dtype for t in found.values()} == {torch.bfloat16}
        config = json.loads((tmp_path / "out" / task / "config.json").read_text())
        assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    whole = merge({**family.content(3), "dtype": "bfloat16"}, tmp_path / "apart")
    assert whole.size.models == 3
    found = as_index_says(tmp_path / "apart" / "tuned1")
    for name, tensor in small.state(family.tuned[1]).items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_the_manifest_says_where_it_comes_from(families, tmp_path):
    family = families("llama")
    content = family.content("2.25", "ties", density=0.3)
    content["models"][1]["parameters"] = {"task": "named", "density": 0.5}
    merge(content, tmp_path / "out", random_seed=5)
    raw = json.loads((tmp_path / "out" / "flexmerge.json").read_text())
    method = raw["method"]
    assert method["algorithm"] == "ties"
    assert method["target_size"] == "2.25"
    assert method["seed"] == 5
    assert method["models"]["named"]["density"] == 0.5
    assert method["models"]["tuned0"]["density"] == 0.3
    assert [task["name"] for task in raw["tasks"]] == ["tuned0", "named", "tuned2"]
    assert [task["model"] for task in raw["tasks"]] == [str(path) for path in family.tuned]
    assert raw["base_model"] == str(family.base)
    assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text()) == content
