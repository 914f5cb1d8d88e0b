"""What is loaded is what is there: the Hub's cache, edited folders, copies without links."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_ext
from mergekit_ext.errors import CheckpointError, MergeWarning
from mergekit_ext.flexmerge import load
from mergekit_ext.flexmerge.reader import export, open_checkpoint
from tests import models as small

QUIET = MergeOptions(quiet=True)
# A size at which tasks share some files and not all; one that is a model itself; masks.
KINDS: dict[str, dict[str, Any]] = {
    "mixed": {"target_size": 1.5, "algorithm": "average"},
    "whole": {"target_size": 1, "algorithm": "average"},
    "masked": {"target_size": 2.25, "algorithm": "emr"},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("folders")
    base, tuned = small.family(folder, small.llama)
    for place in tuned:
        (place / "vocab.txt").write_text("w0\n")
    for kind, parameters in KINDS.items():
        config = small.config("flexmerge", tuned, base, parameters)
        mergekit_ext.merge(yaml.safe_dump(config), folder / kind, QUIET)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def out(families: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint to spoil, with its links."""
    return linked_copy(families["mixed"], tmp_path / "out")


def linked_copy(source: Path, target: Path) -> Path:
    """A copy whose files are links to each other where they are in `source`."""
    first: dict[int, Path] = {}
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.stat().st_ino in first:
            os.link(first[path.stat().st_ino], place)
        else:
            first[path.stat().st_ino] = Path(shutil.copy(path, place))
    return target


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def in_cache(source: Path, folder: Path) -> Path:
    """The snapshot of a checkpoint as huggingface_hub lays it out: links into ``blobs/``."""
    snapshot, blobs = folder / "snapshots" / ("c" * 40), folder / "blobs"
    blobs.mkdir(parents=True)
    for path in (p for p in source.rglob("*") if p.is_file()):
        content = path.read_bytes()
        large = path.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256(content).hexdigest() if large else git_digest(content))
        blob.write_bytes(content)
        place = snapshot / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verify", [False, True])
def test_the_hubs_cache(families: dict[str, Path], tmp_path: Path, kind: str, verify: bool) -> None:
    source = linked_copy(families[kind], tmp_path / "source")
    snapshot = in_cache(source, tmp_path / "models--some--flexmerge")
    expected, found = load(source), load(snapshot, verify=verify)
    for task, model in expected.items():
        theirs = found[task].state_dict()
        assert all(torch.equal(theirs[name], t) for name, t in model.state_dict().items())
    export(snapshot, "tuned1", tmp_path / "one")
    for name, tensor in open_checkpoint(source).tensors("tuned1").items():
        assert torch.equal(small.state(tmp_path / "one")[name], tensor)


def shard(snapshot: Path) -> Path:
    return snapshot / "shards" / "dense-00001.safetensors"


def blob_of_other_content(snapshot: Path) -> str:
    blob = shard(snapshot).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    return "dense-00001.safetensors: found SHA-256"


def another_blob(snapshot: Path) -> str:
    """A sound blob with tensors of the same names and shapes, which is not this shard."""
    tensors = {name: t + 1 for name, t in load_file(shard(snapshot)).items()}
    save_file(tensors, snapshot / "new", metadata={"format": "pt"})
    content = (snapshot / "new").read_bytes()
    blob = snapshot.parent.parent / "blobs" / hashlib.sha256(content).hexdigest()
    (snapshot / "new").rename(blob)
    shard(snapshot).unlink()
    shard(snapshot).symlink_to(blob)
    return "dense-00001.safetensors: found "


def link_to_elsewhere(snapshot: Path) -> str:
    place = snapshot.parent.parent / "elsewhere"
    shutil.move(shard(snapshot).resolve(), place)
    shard(snapshot).unlink()
    shard(snapshot).symlink_to(place)
    return "outside of the checkpoint"


def configuration_outside(snapshot: Path) -> str:
    (snapshot / "tuned0" / "config.json").unlink()
    (snapshot / "tuned0" / "config.json").symlink_to("/etc/hostname")
    return "tuned0/config.json: found a link to /etc/hostname, outside of the checkpoint"


def configuration_of_other_content(snapshot: Path) -> str:
    blob = (snapshot / "tuned0" / "config.json").resolve()
    blob.write_text(blob.read_text().replace("{", '{"added": 1,', 1))
    return "config.json: found Git digest"


@pytest.mark.parametrize(
    "spoil",
    [
        blob_of_other_content,
        another_blob,
        link_to_elsewhere,
        configuration_outside,
        configuration_of_other_content,
    ],
)
def test_hostile_links_in_the_cache_are_refused(
    families: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    snapshot = in_cache(families["mixed"], tmp_path / "models--some--flexmerge")
    part = spoil(snapshot)
    with pytest.raises(CheckpointError, match=re.escape(part)):
        load(snapshot)


def index(out: Path) -> list[str]:
    path = out / "tuned0" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    name = sorted(content["weight_map"])[0]
    content["weight_map"][name] = sorted(set(content["weight_map"].values()))[-1]
    path.write_text(json.dumps(content))
    return ["tuned0/model.safetensors.index.json: found SHA-256"]


def own_shard(out: Path) -> list[str]:
    path = out / "tuned0" / "model-00001-of-00002.safetensors"
    path = path if path.exists() else sorted((out / "tuned0").glob("model-*"))[0]
    tensors = {name: tensor * 2 for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return [f"tuned0/{path.name}: found weights of other content"]


def configuration(out: Path) -> list[str]:
    path = out / "tuned0" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    return ["tuned0/config.json: found SHA-256", "without `verify`"]


def vocabulary_that_is_gone(out: Path) -> list[str]:
    (out / "tuned1" / "vocab.txt").unlink()
    return ["tuned1/vocab.txt: found no file"]


def shard_that_is_gone(out: Path) -> list[str]:
    sorted((out / "tuned1").glob("model-*"))[0].unlink()
    return ["tuned1: found no link to shards/dense-"]


def file_that_transformers_loads_first(out: Path) -> list[str]:
    save_file({"a": torch.ones(2)}, out / "tuned1" / "model.safetensors")
    return ["tuned1/model.safetensors: found weights of other content"]


def code_that_was_added(out: Path) -> list[str]:
    (out / "tuned1" / "modeling_own.py").write_text("class Own: pass\n")
    return ["tuned1/modeling_own.py: found a file that was added later"]


EDITS = [
    index, own_shard, configuration, vocabulary_that_is_gone, shard_that_is_gone,
    file_that_transformers_loads_first, code_that_was_added,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_verifying_sees_an_edited_folder(out: Path, edit: Callable[[Path], list[str]]) -> None:
    load(out, verify=True)
    parts = edit(out)
    with pytest.raises(CheckpointError) as caught:
        load(out, verify=True)
    for part in parts:
        assert part in str(caught.value)
    open_checkpoint(out)


def test_what_describes_a_checkpoint_may_be_edited(out: Path) -> None:
    (out / "README.md").write_text("better words")
    (out / "tuned0" / "README.md").write_text("better words")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    load(out, verify=True)


def test_a_checkpoint_that_is_one_model_is_verified_too(
    families: dict[str, Path], tmp_path: Path
) -> None:
    out = linked_copy(families["whole"], tmp_path / "out")
    load(out, verify=True)
    (out / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"\. config\.json: found SHA-256"):
        load(out, verify=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_without_links_says_how_much_larger_it_is(
    families: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    source = families[kind]
    copied = Path(shutil.copytree(source, tmp_path / "copy"))
    inodes = {p.stat().st_ino: p.stat().st_size for p in source.rglob("*") if p.is_file()}
    wasted = sum(p.stat().st_size for p in copied.rglob("*") if p.is_file()) - sum(inodes.values())
    if kind == "masked":
        assert wasted == 0
        load(copied, verify=True)
        return
    with pytest.warns(MergeWarning, match=re.escape(f"{wasted:,} bytes more")):
        models = load(copied, verify=True)
    for task, model in load(source).items():
        theirs = models[task].state_dict()
        assert all(torch.equal(theirs[name], t) for name, t in model.state_dict().items())
