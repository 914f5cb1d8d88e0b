"""Folders that are not what they should be are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_ext.errors import CheckpointError
from peft_merge.flexmerge.load import load_tasks
from peft_merge.flexmerge.manifest import open_manifest
from peft_merge.merge import merge_adapters
from tests.flexmerge.test_task_folders import in_cache
from tests.peft_merge.models import KINDS, base, saved

FILE = "flexmerge.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("flex")
    sources = [saved(KINDS["plain"], place / f"t{i}", i) for i in range(3)]
    merge_adapters(sources, "flexmerge", parameters={"target_size": 2}).save(place / "out")
    return place / "out"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def edit(folder, change):
    content = json.loads((folder / FILE).read_text())
    change(content)
    (folder / FILE).write_text(json.dumps(content))


def test_a_good_folder_is_read(folder):
    manifest = open_manifest(folder)
    assert [task.name for task in manifest.tasks] == ["t0", "t1", "t2"]
    assert {len(group.tasks) for block in manifest.blocks for group in block.groups} == {1, 2}


def test_of_many_problems_a_hundred_are_listed(folder):
    entry = {"name": f"{'x' * 200}\n", "groups": []}
    edit(folder, lambda c: c["blocks"].extend([entry] * 3_000))
    with pytest.raises(CheckpointError) as refused:
        open_manifest(folder)
    assert len(refused.value.problems) == 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(version=2), "1 problem with .*\\n.*version: found 2"),
        (lambda c: c.update(format="flexmerge"), "format: found 'flexmerge'"),
        (lambda c: c.pop("tasks"), "tasks: found nothing"),
        (lambda c: c["tasks"][0].update(name="../t0"), "'../t0'"),
        (lambda c: c["tasks"][0].update(name="T1"), "names that differ"),
        (lambda c: c["tasks"][0].update(name="lora"), "something else of this name"),
        (lambda c: c["tasks"][0].update(name="pop"), "something else of this name"),
        (lambda c: c["tasks"][0]["files"].pop(), "adapter_model.safetensors"),
        (lambda c: c["tasks"][0]["files"][0].update(name="../x"), "adapter_config.json"),
        (lambda c: c["tasks"][0]["files"][0].update(bytes=-1), "bytes: found -1"),
        (lambda c: c["tasks"][0]["files"][0].update(bytes=1), "1 bytes"),
        (lambda c: c["tasks"][0]["files"][0].update(sha256="0" * 64), "SHA-256"),
        (lambda c: c["blocks"][0]["groups"].pop(), "in 0 groups; expected each task in one"),
        (lambda c: c["blocks"][0].update(groups={}), "groups: found {}"),
        (lambda c: c.update(kind="dora"), "'lora' or 'ia3'"),
    ],
)
def test_wrong_manifests(folder, change, said):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=said):
        open_manifest(folder)


def test_no_manifest_and_no_json(folder):
    (folder / FILE).write_text("[")
    with pytest.raises(CheckpointError, match="JSON"):
        open_manifest(folder)
    (folder / FILE).write_text("[1]")
    with pytest.raises(CheckpointError, match=r"found \["):
        open_manifest(folder)
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match="flexmerge"):
        open_manifest(folder)


def test_links_that_leave_the_folder(folder, tmp_path):
    file = folder / "t1" / "adapter_model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        open_manifest(folder)


def test_the_hubs_cache(folder, tmp_path):
    snapshot = in_cache(folder, tmp_path / "models--some--tasks")
    assert open_manifest(snapshot) == open_manifest(folder)
    assert load_tasks(base(KINDS["plain"]), snapshot).active_adapters == ["t0"]


def test_changed_weights(folder):
    file = folder / "t1" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="t1/adapter_model"):
        load_tasks(base(KINDS["plain"]), folder)
    open_manifest(folder, verify=False)


def test_what_is_called_shared_must_be_the_same(folder):
    manifest = open_manifest(folder)
    module, tasks = next(
        (group.modules[0], group.tasks)
        for block in manifest.blocks
        for group in block.groups
        if len(group.tasks) == 2
    )
    file = folder / tasks[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if module in key)
    tensors[key] = torch.randn_like(tensors[key])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="differ between"):
        load_tasks(base(KINDS["plain"]), folder, verify=False)
