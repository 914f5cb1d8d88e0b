"""Checkpoints as the engine writes them, in the cases that real models seldom show."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.files import described
from mergekit_ext.flexmerge.manifest import FILE_NAME, read_manifest
from mergekit_ext.flexmerge.merging import Merging
from mergekit_ext.flexmerge.plan import Dendrograms, Plan
from mergekit_ext.flexmerge.reader import Checkpoint, open_checkpoint
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.flexmerge.stored import StoredGroup
from mergekit_ext.flexmerge.writer import write_checkpoint
from mergekit_ext.kernels.similarity import cosines
from tests.flexmerge.inputs import algorithm, family, reader
from tests.reference import flexmerge as naive

MASKS = ("emr", "consensus")
KINDS = {
    "float32": lambda task: torch.float32,
    "bfloat16": lambda task: torch.bfloat16,
    "mixed": lambda task: [torch.float32, torch.bfloat16, torch.float32, torch.float16][task + 1],
    "double": lambda task: torch.float64 if task == 1 else torch.float32,
    "half over float32": lambda task: torch.float32 if task < 0 else torch.bfloat16,
}


def algorithm_for(name, count, shared=None, scope="block"):
    return algorithm(name, count, {"lambda": 1.0, "density": 0.4, **(shared or {})}, scope)


def planner_for(found, masks=False, forced=None):
    analysis = analyse(found)
    similarities = [cosines(analysis.grams[b.name]) for b in found.layout.blocks]
    return Dendrograms(Storage(found.layout, masks, forced), similarities)


def write(folder, base, models, target, name="average", forced=None, shard_size=0):
    found = reader(base, models)
    algorithm = algorithm_for(name, len(models))
    plan = planner_for(found, algorithm.masks, forced).plan(Target.parse(target))
    return write_plan(folder, found, plan, algorithm, forced, shard_size)


def write_plan(folder, found, plan, algorithm, forced=None, shard_size=0):
    folder.mkdir()
    models = [f"model{i}" for i in range(len(found.layout.tasks))]
    origin = {"generator": "a test", "method": {"algorithm": algorithm.name}, "base_model": "base"}
    merging = Merging(algorithm, forced)
    made = write_checkpoint(folder, found, plan, merging, origin, models, shard_size=shard_size)
    made = made.model_copy(update={"task_files": described(folder, found.layout.tasks)})
    (folder / FILE_NAME).write_text(made.to_json(), encoding="utf-8")
    return made


def as_index_says(folder):
    """A task's tensors, as any reader of Hugging Face checkpoints finds them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    on_disk = {p.name for p in folder.glob("*.safetensors")}
    assert on_disk == set(files)
    listed = [name for content in files.values() for name in content]
    assert sorted(listed) == sorted(index["weight_map"])  # each once, none left over
    total = sum(t.numel() * t.element_size() for c in files.values() for t in c.values())
    assert index["metadata"]["total_size"] == total
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def stored_bytes(folder):
    """Bytes of tensors under shards/, from the headers."""
    files = [load_file(path) for path in (folder / "shards").iterdir()]
    return sum(t.numel() * t.element_size() for content in files for t in content.values())


def wanted_of(manifest, block, group, base, models, name="average"):
    names = [t.name for t in block.tensors]
    place = {task.name: i for i, task in enumerate(manifest.tasks)}
    members = [models[place[task]] for task in group.tasks]
    given_options = naive.Options(1.0, None, [0.4] * len(members))
    like = [base[n] for n in names]
    inputs = [[m[n] for n in names] for m in members]
    if group.kind == "masked":
        return names, naive.masked(name, like, inputs, given_options)
    return names, [naive.merged(name, like, inputs, given_options)] * len(members)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("done", [0, 0.4, 0.7, 1])
@pytest.mark.parametrize("name", ["average", "ties", "emr", "consensus"])
def test_every_block_of_every_task(kind, done, name, tmp_path):
    base, models = family(3, dtype=KINDS[kind])
    models[1]["head.weight"] = torch.randn(2, 6)
    found, algorithm = reader(base, models), algorithm_for(name, 3)
    planner = planner_for(found, algorithm.masks)
    plan = planner.at(round(done * (len(planner.trajectory) - 1)))
    if done == 1:
        assert all(len(groups) == 1 for groups in plan.groups)
    kinds = {group.kind for groups in plan.groups for group in groups}
    if done in (0, 1):
        assert ("masked" in kinds) == (name in MASKS and done == 1)
    manifest = write_plan(tmp_path / "out", found, plan, algorithm)
    assert manifest.size.bytes == stored_bytes(tmp_path / "out")
    assert read_manifest(tmp_path / "out") == manifest
    checkpoint = open_checkpoint(tmp_path / "out", verify=True)
    assert isinstance(checkpoint, Checkpoint)
    place = {task.name: i for i, task in enumerate(manifest.tasks)}
    for task in manifest.tasks:
        found = dict(checkpoint.tensors(task.name))
        original = models[place[task.name]]
        assert found.keys() == original.keys()
        if task.ordinary:
            plain = as_index_says(tmp_path / "out" / task.name)
            assert plain.keys() == found.keys()
            assert all(torch.equal(plain[n], found[n]) for n in plain)
        else:
            assert not list((tmp_path / "out" / task.name).iterdir())
        for block in manifest.blocks:
            (group,) = [g for g in block.groups if task.name in g.tasks]
            if len(group.tasks) == 1:
                for tensor in block.tensors:
                    same = found[tensor.name], original[tensor.name]
                    assert same[0].dtype == same[1].dtype
                    assert torch.equal(*same)
                continue
            names, wanted = wanted_of(manifest, block, group, base, models, name)
            for tensor, value in zip(names, wanted[group.tasks.index(task.name)], strict=True):
                dtypes = {models[place[t]][tensor].dtype for t in group.tasks}
                dtype = found[tensor].dtype
                for member in dtypes:
                    assert torch.promote_types(dtype, member) == dtype
                steps = 3 * torch.finfo(dtype).eps
                size = max(1e-3, float(value.abs().max()))
                assert torch.allclose(
                    found[tensor].double(), value, rtol=steps, atol=max(steps, 1e-6) * size
                )
        assert torch.equal(
            found.get("head.weight", torch.ones(1)), original.get("head.weight", torch.ones(1))
        )


def test_size_one_is_a_checkpoint_itself(tmp_path):
    base, models = family(3)
    write(tmp_path / "out", base, models, 1)
    whole = as_index_says(tmp_path / "out")
    assert whole.keys() == base.keys()
    for task in ("task0", "task1", "task2"):
        assert all(
            torch.equal(whole[n], t) for n, t in as_index_says(tmp_path / "out" / task).items()
        )
    models[2]["head.weight"] = torch.ones(1)
    write(tmp_path / "private", base, models, 1)
    assert not (tmp_path / "private" / "model.safetensors.index.json").exists()
    write(tmp_path / "apart", base, models[:2], 1.5)
    assert not (tmp_path / "apart" / "model.safetensors.index.json").exists()


def test_files_are_shared_and_stored_once(tmp_path):
    base, models = family(3)
    manifest = write(tmp_path / "out", base, models, 2.2, shard_size=600)
    shards = {(tmp_path / "out" / f.path).stat().st_ino: f for f in manifest.files}
    seen = {inode: set() for inode in shards}
    for task in manifest.tasks:
        for path in (tmp_path / "out" / task.name).glob("*.safetensors"):
            assert path.stat().st_size <= 600 + 1000  # headers
            seen[path.stat().st_ino].add(task.name)
    for inode, tasks in seen.items():
        assert tasks == set(shards[inode].tasks)
    assert any(len(tasks) > 1 for tasks in seen.values())


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
@pytest.mark.parametrize("kind", ["symbolic", "copies"])
def test_without_hard_links(kind, tmp_path, monkeypatch):
    def no(*args, **kwargs):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no)
    if kind == "copies":
        monkeypatch.setattr(Path, "symlink_to", no)
    base, models = family(3)
    write(tmp_path / "out", base, models, 1.8)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    for number in range(3):
        folder = tmp_path / "moved" / f"task{number}"
        assert as_index_says(folder).keys() == base.keys()
        links = [path.is_symlink() for path in folder.glob("*.safetensors")]
        assert all(links) if kind == "symbolic" else not any(links)
    assert open_checkpoint(tmp_path / "moved", verify=True).tasks == ("task0", "task1", "task2")


@pytest.mark.parametrize("target", [2, 1.5, 1])
def test_a_dtype_for_everything_shareable(target, tmp_path):
    base, models = family(2)
    models[0]["head.weight"] = torch.randn(2, 6)
    manifest = write(tmp_path / "out", base, models, target, forced=torch.bfloat16)
    for number, model in enumerate(models):
        found = as_index_says(tmp_path / "out" / f"task{number}")
        assert {t.dtype for n, t in found.items() if n != "head.weight"} == {torch.bfloat16}
        for block in manifest.blocks:
            (group,) = [g for g in block.groups if f"task{number}" in g.tasks]
            if len(group.tasks) == 1:
                for tensor in block.tensors:
                    assert torch.equal(found[tensor.name], model[tensor.name].bfloat16())
    kept = as_index_says(tmp_path / "out" / "task0")["head.weight"]
    assert torch.equal(kept, models[0]["head.weight"])


@pytest.mark.parametrize("name", ["average", "emr", "consensus"])
def test_values_out_of_range_stop_the_merge(name, tmp_path):
    base, models = family(3, dtype=lambda task: torch.float16)
    for model in (base, *models):
        model["mlp.up"][0, 0] = 60_000 if model is not base else -60_000
    models[2]["mlp.up"][0, 0] = 65_000
    shared = {"lambda": 1.0, "threshold": 0.0, "density": 1.0}
    if name == "average":
        name, shared["lambda"] = "task_arithmetic", 1.5
    found = reader(base, models)
    algorithm = algorithm_for(name, 3, shared)
    kind = "masked" if algorithm.masks else "dense"
    groups = tuple((StoredGroup((0, 1, 2), kind, 0.5),) for _ in found.layout.blocks)
    storage = Storage(found.layout, algorithm.masks)
    size = storage.size(1000)
    with pytest.raises(MergeError, match=r"mlp\.up: 1 of 54 merged values are not finite"):
        write_plan(tmp_path / "out", found, Plan(groups, size), algorithm)


def test_weights_that_only_readers_would_see_out_of_range(tmp_path):
    """All that is stored of an EMR group is finite; the first task's rescaled weights are not."""
    base = {"b.x": torch.tensor([40_000.0, 0.0]).half()}
    steps = ([25_000, -30_000], [24_000, 20_000], [24_000, 20_000])
    models = [{"b.x": base["b.x"] + torch.tensor(step).half()} for step in steps]
    found, algorithm = reader(base, models), algorithm_for("emr", 3)
    plan = Plan(((StoredGroup((0, 1, 2), "masked", 0.5),),), Storage(found.layout, True).size(30))
    with pytest.raises(MergeError, match=r"b\.x: 1 of 2 merged values are not finite"):
        write_plan(tmp_path / "out", found, plan, algorithm)


def test_a_cast_out_of_range_stops_the_merge(tmp_path):
    base, models = family(2)
    models[1]["mlp.up"][0, 0] = 1e6
    with pytest.raises(MergeError, match=r"mlp\.up.*float16"):
        write(tmp_path / "out", base, models, 2, forced=torch.float16)


def test_odd_tensors(tmp_path):
    """Without elements, scalars, integers, half and double beside each other, other dtypes."""
    base, models = family(2)
    for number, state in enumerate((base, *models)):
        state["mlp.none"] = torch.zeros(0, 3)
        state["ids.position"] = torch.arange(5)
        state["flag.on"] = torch.tensor(True)
        state["small.w"] = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
        state["gate.double"] = torch.tensor(1.0 + number, dtype=torch.float64)
    manifest = write(tmp_path / "out", base, models, 1)
    for number, model in enumerate(models):
        found = as_index_says(tmp_path / "out" / f"task{number}")
        assert found.keys() == model.keys()
        for name in ("mlp.none", "ids.position", "flag.on"):
            assert torch.equal(found[name], model[name])
        assert found["small.w"].dtype == torch.float8_e4m3fn
        assert float(found["gate.double"]) == 2.5
        assert found["gate.scale"].dtype == torch.float32
    assert {t.name for t in manifest.private[0].tensors} == {"ids.position", "flag.on", "small.w"}
