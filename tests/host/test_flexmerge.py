"""`merge_method: flexmerge` on real small models, from YAML to folders that transformers loads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import mergekit_ext
from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.events import MergeCallback
from mergekit_ext.flexmerge.manifest import MASKED, Manifest
from mergekit_ext.flexmerge.reader import open_checkpoint
from tests import models as small
from tests.reference import flexmerge as naive

TASKS = ("tuned0", "tuned1", "tuned2")
QUIET = MergeOptions(quiet=True)


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    )


MAKERS = {"llama": small.llama, "bert": small.bert, "vit": vit, "t5": small.t5, "gpt2": gpt2}


@dataclass(frozen=True)
class Family:
    """A base, its fine-tunes, and what is stored of them."""

    base: Path
    tuned: Sequence[Path]

    @property
    def states(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        return small.state(self.base), [small.state(path) for path in self.tuned]

    def content(self, target: object, algorithm: str = "average", **parameters: Any):
        given = {"target_size": target, "algorithm": algorithm, **parameters}
        return small.config("flexmerge", self.tuned, self.base, given)


def made(folder: Path, name: str, dtype: torch.dtype) -> Family:
    base, tuned = small.family(folder, MAKERS[name], dtype)
    if name == "bert":  # a head of another size for every task
        for labels, path in enumerate(tuned, 2):
            model = BertForSequenceClassification.from_pretrained(
                path, num_labels=labels, ignore_mismatched_sizes=True
            )
            model.to(dtype).save_pretrained(path)
    return Family(base, tuned)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    found: dict[tuple[str, torch.dtype], Family] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Family:
        if (name, dtype) not in found:
            found[name, dtype] = made(tmp_path_factory.mktemp(name), name, dtype)
        return found[name, dtype]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return get


def merge(content: Mapping[str, Any], out: Path, *callbacks: object, **options: Any) -> Manifest:
    settings = MergeOptions(quiet=True, **options)
    mergekit_ext.merge(yaml.safe_dump(dict(content)), out, settings, callbacks=callbacks)
    return Manifest.from_json((out / "flexmerge.json").read_text(), "flexmerge.json")


def as_index_says(folder: Path) -> dict[str, Tensor]:
    """A checkpoint as any reader finds it; every tensor is named once and there once."""
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {p.name for p in folder.glob("*.safetensors")} == set(weights.values())
    files = {name: load_file(folder / name) for name in set(weights.values())}
    assert sorted(n for content in files.values() for n in content) == sorted(weights)
    return {name: files[file][name] for name, file in weights.items()}


def on_disk(folder: Path) -> int:
    """Bytes of all weight files, hard links once."""
    files = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*.safetensors")}
    return sum(files.values())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


def cuts_of(manifest: Manifest, base, models, density: float) -> list[float]:
    shared = {t.name: base[t.name] for b in manifest.blocks for t in b.tensors}
    return [naive.least_kept(shared, model, density) for model in models]


def check_blocks(
    out: Path, family: Family, algorithm: str, options: naive.Options, tolerance: float
) -> set[str]:
    """Compare every block of every task with F of its group; return the kinds of groups seen."""
    checkpoint = open_checkpoint(out, verify=True)
    manifest = Manifest.from_json((out / "flexmerge.json").read_text(), "x")
    base, models = family.states
    place = {task.name: i for i, task in enumerate(manifest.tasks)}
    found = {task: dict(checkpoint.tensors(task)) for task in place}
    for task, tensors in found.items():
        assert tensors.keys() == models[place[task]].keys()
    kinds = set()
    for block in manifest.blocks:
        names = [t.name for t in block.tensors]
        assert sorted(t for group in block.groups for t in group.tasks) == sorted(place)
        for group in block.groups:
            kinds.add(group.kind if len(group.tasks) > 1 else "alone")
            numbers = [place[task] for task in group.tasks]
            if len(numbers) == 1:
                for name in names:
                    assert torch.equal(found[group.tasks[0]][name], models[numbers[0]][name])
                continue
            told = naive.Options(
                options.lam,
                None,
                None if options.densities is None else [options.densities[i] for i in numbers],
                options.scope,
                None if options.cuts is None else [options.cuts[i] for i in numbers],
            )
            like, inputs = (
                [base[n] for n in names],
                [[models[i][n] for n in names] for i in numbers],
            )
            if group.kind == MASKED:
                wanted = naive.masked(algorithm, like, inputs, told)
            else:
                wanted = [naive.merged(algorithm, like, inputs, told)] * len(numbers)
            for task, values in zip(group.tasks, wanted, strict=True):
                for name, value in zip(names, values, strict=True):
                    tensor = found[task][name]
                    assert tensor.shape == value.shape
                    limit = tolerance * max([1e-3, *value.abs().flatten().tolist()])
                    gap = max([0.0, *(tensor.double() - value).abs().flatten().tolist()])
                    assert gap <= limit, f"{block.name}: {name} of {task}: {gap}"
    for task in manifest.private:
        for tensor in task.tensors:
            same_value = found[task.task][tensor.name], models[place[task.task]][tensor.name]
            assert torch.equal(*same_value)
    return kinds


DTYPES = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7}
CASES = [(name, dtype) for name in MAKERS for dtype in DTYPES]


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
    told = naive.Options(1.5)
    kinds = check_blocks(tmp_path / "out", family, "task_arithmetic", told, DTYPES[dtype])
    assert kinds == {"alone", "dense"}


@pytest.mark.parametrize(
    ("algorithm", "parameters"),
    [
        ("average", {"weight": 1.0}),
        ("task_arithmetic", {"lambda": 1.2}),
        ("ties", {"density": 0.3, "lambda": 0.9, "trim_scope": "tensor"}),
    ],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_size_one_is_mergekits_own_method(algorithm, parameters, name, families, tmp_path):
    family = families(name)
    if name == "bert":  # mergekit merges heads of one size only
        base, tuned = small.family(tmp_path / "bert", small.bert)
        family = Family(base, tuned)
    out, stock = tmp_path / "out", tmp_path / "stock"
    merge(family.content(1, algorithm, heads="merged", **parameters), out)
    method, base = algorithm, family.base
    given: dict[str, Any] = {"weight": 1.0}
    if algorithm == "average":
        method, base = "linear", None
    elif algorithm == "task_arithmetic":
        given = {"weight": 1.2 / 3}
    else:
        given |= {"density": 0.3, "lambda": 0.9}
    content = small.config(method, family.tuned, base, given)
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
    "nan": ({}, naive.Options()),
    "consensus": ({"trim_scope": "block"}, naive.Options(1.0, None, [0.1] * 3)),
    "emr": ({}, naive.Options()),
    "channel_merging": ({}, naive.Options(1.5)),
}


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_algorithms(algorithm, name, families, tmp_path):
    family = families(name)
    parameters, told = ALGORITHMS[algorithm]
    masks = algorithm in ("emr", "consensus")
    target = 2.5 if masks else 2
    manifest = merge(family.content(target, algorithm, **parameters), tmp_path / "out")
    assert manifest.size.models <= target
    tolerance = 3e-5 if algorithm == "tsv_m" else 5e-6
    kinds = check_blocks(tmp_path / "out", family, algorithm, told, tolerance)
    assert (MASKED if masks else "dense") in kinds


@pytest.mark.parametrize("algorithm", ["ties", "pcb", "consensus"])
def test_trimming_whole_models(algorithm, families, tmp_path):
    family = families("llama")
    target = 2.5 if algorithm == "consensus" else 1
    manifest = merge(family.content(target, algorithm, density=0.2), tmp_path / "out")
    cuts = cuts_of(manifest, *family.states, 0.2)
    told = naive.Options(1.0, None, [0.2] * 3, "model", cuts)
    check_blocks(tmp_path / "out", family, algorithm, told, 5e-6)


@pytest.mark.parametrize("similarity_on", ["original", "trimmed"])
@pytest.mark.parametrize("granularity", ["component", "layer", "tensor", "model"])
def test_groups_are_those_of_algorithm_1(granularity, similarity_on, families, tmp_path):
    family = families("llama")
    content = family.content(
        2.2, "ties", density=0.05, similarity_on=similarity_on, granularity=granularity
    )
    manifest = merge(content, tmp_path / "out")
    base, models = family.states
    told = naive.Options(1.0, None, [0.05] * 3, "model", cuts_of(manifest, base, models, 0.05))
    cosines, blocks = [], []
    for block in manifest.blocks:
        names = [t.name for t in block.tensors]
        deltas = [[naive.delta(m[n], base[n]) for n in names] for m in models]
        if similarity_on == "trimmed":
            deltas = naive.trimmed(deltas, told)
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


LOAD = """
import json, sys, torch
from transformers import AutoConfig, AutoModel
import transformers
torch.manual_seed(0)
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    if hasattr(config, "patch_size"):
        given = {"pixel_values": torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)}
    else:
        ids = torch.arange(2, 12).reshape(1, 10)
        given = {"input_ids": ids}
        if config.is_encoder_decoder:
            given["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        found[folder] = model.eval()(**given).logits
assert "mergekit_ext.flexmerge" not in sys.modules and "mergekit" not in sys.modules
torch.save(found, sys.argv[1])
"""


def logits(folders: Sequence[Path], scratch: Path) -> list[Tensor]:
    """What plain transformers computes, in a process without this project."""
    result = scratch / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, result, *folders],
        capture_output=True,
        text=True,
        cwd=scratch,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MERGEKIT_EXT_AUTOLOAD": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(result)
    return [found[str(folder)] for folder in folders]


def test_plain_transformers_loads_every_task(families, tmp_path):
    """All architectures in one process: each task computes what the expected model does."""
    pairs: list[tuple[Path, Path]] = []
    for name in MAKERS:
        family = families(name)
        out = tmp_path / name
        merge(family.content(2), out)
        base, models = family.states
        manifest = Manifest.from_json((out / "flexmerge.json").read_text(), "x")
        for number, task in enumerate(TASKS):
            expected = tmp_path / f"{name}-{task}-expected"
            shutil.copytree(family.tuned[number], expected)
            state = dict(models[number])
            for block in manifest.blocks:
                (group,) = [g for g in block.groups if task in g.tasks]
                for tensor in block.tensors:
                    members = [models[TASKS.index(t)][tensor.name].double() for t in group.tasks]
                    mean = sum(members) / len(members)
                    state[tensor.name] = mean.to(base[tensor.name].dtype).contiguous()
            save_file(state, expected / "model.safetensors", {"format": "pt"})
            pairs.append((out / task, expected))
        if name != "bert" and not manifest.private:
            merge(family.content(1), tmp_path / f"{name}-one")
            pairs.append((tmp_path / f"{name}-one", tmp_path / f"{name}-one" / "tuned0"))
    assert len(pairs) > 15
    found = logits([folder for pair in pairs for folder in pair], tmp_path)
    for (folder, _), one, other in zip(pairs, found[::2], found[1::2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), folder
    # And they are not all the same model.
    assert not torch.allclose(found[0], found[2])


def digests(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "flexmerge_analysis.json")
    }


def test_stock_mergekit_yaml_and_our_command_write_the_same(families, tmp_path):
    family = families("llama")
    config = small.write_yaml(tmp_path / "m.yml", family.content(1.7, "ties"))
    stock = small.command("mergekit-yaml", config, tmp_path / "stock", "--quiet")
    assert stock.returncode == 0, stock.stderr
    ours = small.command("mergekit-ext", "merge", config, tmp_path / "ours", "--quiet")
    assert ours.returncode == 0, ours.stderr
    assert digests(tmp_path / "stock") == digests(tmp_path / "ours")
    merge(yaml.safe_load(config.read_text()), tmp_path / "called")
    called, wanted = digests(tmp_path / "called"), digests(tmp_path / "stock")
    # The text of the configuration was not the same.
    del called["mergekit_config.yml"], wanted["mergekit_config.yml"]
    assert called == wanted
    readme = (tmp_path / "stock" / "README.md").read_text()
    assert "flexmerge" in readme.lower()
    assert re.search(r"1\.\d+", readme)


def test_runs_are_alike_and_seeds_are_not(families, tmp_path):
    family = families("llama")
    content = family.content(1.8, "average", order="random", dare_density=0.5)
    outs = []
    for number, seed in enumerate((1, 1, 2)):
        merge(content, tmp_path / str(number), random_seed=seed)
        outs.append({k: v for k, v in digests(tmp_path / str(number)).items() if "shards" in k})
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]


# Nothing is left of a merge that stops


@pytest.mark.parametrize("place", ["base", "tuned1"])
def test_a_value_that_is_not_finite(place, families, tmp_path):
    family = families("llama")
    folder = tmp_path / "spoiled" / place
    shutil.copytree(family.base.parent / place, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    content = family.content(1.5)
    if place == "base":
        content["base_model"] = str(folder)
    else:
        content["models"][1]["model"] = str(folder)
    with pytest.raises(NonFiniteError) as caught:
        merge(content, tmp_path / "out" / "deep")
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"
    assert caught.value.model == ("the base model" if place == "base" else "tuned1")
    assert not (tmp_path / "out" / "deep").exists()
    assert not list(tmp_path.rglob("*incomplete*"))


def test_a_merged_value_that_leaves_the_range(tmp_path):
    base, tuned = small.family(tmp_path, small.llama, torch.float16)
    for folder in tuned:
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"][0, 0] = 60_000
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"lm_head\.weight.*float16"):
        merge(Family(base, tuned).content(1, "task_arithmetic"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", *TASKS]


class Listener(MergeCallback):
    def __init__(self, stop_at: int | None = None):
        self.heard, self.groups, self.stop_at, self.sizes = [], {}, stop_at, []

    def on_merge_begin(self, event):
        self.heard.append("begin")

    def on_statistics_begin(self, event):
        self.heard.append("statistics")

    def on_block_merged(self, event):
        self.groups[event.name] = event.groups
        if len(self.groups) == self.stop_at:
            raise RuntimeError("enough")

    def on_size_reached(self, event):
        self.sizes.append(event)

    def on_merge_end(self, event):
        self.heard.append("end")


def test_an_exception_in_the_middle(families, tmp_path):
    family = families("llama")
    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        with pytest.raises(RuntimeError, match="enough"):
            merge(family.content(1.5), out, Listener(stop_at=7))
        assert not out.exists() or not list(out.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
    merge(family.content(1.5), tmp_path / "empty")
    assert as_index_says(tmp_path / "empty" / "tuned0")


def test_callbacks_hear_what_the_manifest_says(families, tmp_path):
    listener = Listener()
    manifest = merge(families("vit").content(1.7), tmp_path / "out", listener)
    assert listener.heard == ["begin", "statistics", "end"]
    assert listener.groups == {b.name: tuple(g.tasks for g in b.groups) for b in manifest.blocks}
    (size,) = listener.sizes
    assert (size.algorithm, size.models, size.bytes) == (
        "average",
        manifest.size.models,
        manifest.size.bytes,
    )


# Analyses are kept


def test_the_analysis_is_used_again_until_something_changes(families, tmp_path):
    source = families("llama")
    shutil.copytree(source.base.parent, tmp_path / "models")
    family = Family(tmp_path / "models" / "base", [tmp_path / "models" / task for task in TASKS])
    runs = iter(range(100))

    def measured(*arguments, **parameters) -> bool:
        listener = Listener()
        merge(family.content(*arguments, **parameters), tmp_path / f"out{next(runs)}", listener)
        return "statistics" in listener.heard

    assert measured(2)
    assert not measured(2)
    assert not measured(1.3, "task_arithmetic", linkage="max")
    assert not measured(1, "ties", trim_scope="tensor")
    assert measured(2, granularity="layer")
    assert measured(1.5, "ties", density=0.3)
    assert not measured(1, "ties", density=0.3)
    assert measured(1.5, "ties", density=0.2)
    assert measured(1, "ties", density=0.3, similarity_on="trimmed")
    path = family.tuned[1] / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] += 1
    save_file(state, path, {"format": "pt"})
    assert measured(2)
    assert not measured(2)
    for found in tmp_path.glob("out*/flexmerge_analysis.json"):
        found.write_text(found.read_text()[:-40])
    assert measured(2)


def test_an_analysis_of_other_weights_would_show(families, tmp_path):
    """The one that is reused decides: this is how a stale one would do harm."""
    family = families("llama")
    first = merge(family.content(1.5), tmp_path / "first")
    path = tmp_path / "first" / "flexmerge_analysis.json"
    content = json.loads(path.read_text())
    content["grams"] = {name: torch.eye(3).tolist() for name in content["grams"]}
    path.write_text(json.dumps(content))
    assert merge(family.content(1.5), tmp_path / "second").blocks != first.blocks


# Cases at the edges


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


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    state = change(dict(state))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_dtypes_that_differ_between_models(families, tmp_path):
    source = families("llama")
    shutil.copytree(source.base.parent, tmp_path / "m")
    family = Family(tmp_path / "m" / "base", [tmp_path / "m" / task for task in TASKS])
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
    source = families("llama")
    shutil.copytree(source.base.parent, tmp_path / "m")
    family = Family(tmp_path / "m" / "base", [tmp_path / "m" / task for task in TASKS])
    odd = {
        "model.layers.0.mlp.none": torch.zeros(0, 4),
        "model.layers.0.mlp.scalar": torch.tensor(0.5),
        "model.ids": torch.arange(3),
    }
    for folder in (family.base, *family.tuned):
        rewrite(folder, lambda s: {**s, **odd})
    rewrite(family.tuned[1], lambda s: {n: t for n, t in s.items() if "q_proj" not in n})
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
    shutil.copytree(source.base.parent, tmp_path / "m")
    family = Family(tmp_path / "m" / "base", [tmp_path / "m" / task for task in TASKS])
    wanted = merge(source.content(1.7), tmp_path / "wanted")
    model = transformers.LlamaForCausalLM.from_pretrained(family.tuned[0])
    (family.tuned[0] / "model.safetensors").unlink()
    model.save_pretrained(family.tuned[0], max_shard_size="10KB")
    assert len(list(family.tuned[0].glob("*.safetensors"))) > 2
    state = load_file(family.tuned[1] / "model.safetensors")
    torch.save(state, family.tuned[1] / "pytorch_model.bin")
    (family.tuned[1] / "model.safetensors").unlink()
    found = merge(family.content(1.7), tmp_path / "found")
    assert [f.sha256 for f in found.files] == [f.sha256 for f in wanted.files]
    assert not list((tmp_path / "found" / "tuned1").glob("*.bin"))
    assert not list((tmp_path / "found" / "tuned0").glob("model.safetensors"))


def tied_family(folder: Path, twice: Sequence[str]) -> Family:
    """Llamas with one matrix for input and output; those of `twice` store it under both names."""

    def tied() -> PreTrainedModel:
        config = small.llama().config
        config.tie_word_embeddings = True
        return transformers.LlamaForCausalLM(config)

    base, tuned = small.family(folder, tied)
    for name in twice:
        rewrite(
            folder / name,
            lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()},
        )
    return Family(base, tuned)


@pytest.mark.parametrize(
    "twice",
    [(), ("tuned1",), ("base",), TASKS, ("base", "tuned0"), ("base", *TASKS)],
    ids=lambda names: "+".join(names) or "nowhere",
)
@pytest.mark.parametrize("target", [3, 1.7, 1])
@pytest.mark.parametrize("algorithm", ["average", "ties"])
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


PEAK = """
import resource, sys, yaml
import torch, mergekit_ext
from mergekit.options import MergeOptions
from mergekit_ext.host.run import merge
torch.set_num_threads(1)
import transformers.models.llama
mergekit_ext.register()
content = yaml.safe_load(open(sys.argv[1]).read())
for target in (8, 2.5):  # the first run loads what is loaded late
    content["parameters"]["target_size"] = target
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge(yaml.safe_dump(content), f"{sys.argv[2]}/{target}", MergeOptions(quiet=True))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_that_of_one_block(tmp_path):
    """Eight models of 60 MB in 16 layers: a block of all is about 25 MB, everything 480 MB."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config)
    names = ["base", *(f"t{i}" for i in range(8))]
    for number, name in enumerate(names):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * number * torch.rand_like(parameter))
        model.save_pretrained(tmp_path / name)
    size = (tmp_path / "t0" / "model.safetensors").stat().st_size
    assert size > 55e6
    content = small.config(
        "flexmerge",
        [tmp_path / name for name in names[1:]],
        tmp_path / "base",
        {"target_size": 8, "algorithm": "ties"},
    )
    path = small.write_yaml(tmp_path / "m.yml", content)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, path, tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Vectors, task vectors and a result of one MLP: 18 times 3 MB.
    assert int(done.stdout) < 150


def test_adapters_on_one_base(families, tmp_path):
    """mergekit's `base+adapter`: tasks go by their adapters' names."""
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
    manifest = merge(content, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
    assert [task.name for task in manifest.tasks] == ["one", "two"]
    found = [as_index_says(tmp_path / "out" / name) for name in ("one", "two")]
    name = "model.layers.0.self_attn.q_proj.weight"
    before = small.state(family.base)
    assert not torch.equal(found[0][name], before[name])
    # Blocks that no adapter touches are alike in both, and shared first.
    apart = {block.name for block in manifest.blocks if len(block.groups) == 2}
    assert apart >= {f"model.layers.{number}.attention" for number in range(3)}
    assert torch.equal(found[1]["lm_head.weight"], before["lm_head.weight"])
