"""Merges by two processes: the same bytes as by one; killed, failed, gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_ext
from mergekit_ext.io.headers import read_safetensors
from mergekit_ext.parallel import Ranks
from tests import models
from tests.processes.launching import ROOT, TORCHRUN, python

METHODS = {
    "nan_ties": ("nan_ties", {"density": 0.5, "granularity": "model"}),
    "nan_dare_ties": ("nan_dare_ties", {"density": 0.5}),
    "lore": ("lore", {"mu_relative": 0.1}),
    "groups": ("flexmerge", {"target_size": 1.6}),
    "residuals": ("flexmerge", {"target_size": 1.6, "algorithm": "residual"}),
    "adapters": ("decompose", {"target_size": 1.6, "vectors": "own"}),
}
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return models.family(tmp_path_factory.mktemp("models"), models.llama)


def write(folder: Path, name: str, family, merge: str | None = None) -> Path:
    base, tuned = family
    method, parameters = METHODS[merge or name]
    content = models.config(method, tuned, base, parameters)
    return models.write_yaml(folder / f"{name}.yml", content)


@pytest.fixture(scope="module")
def alone(family, tmp_path_factory):
    """What one process makes of each."""
    folder = tmp_path_factory.mktemp("one")
    for name in METHODS:
        mergekit_ext.merge(write(folder, name, family), folder / name / "out", OPTIONS)
    return folder


@pytest.fixture(scope="module")
def pairs(family, tmp_path_factory):
    """What two processes make of each; and of one, when one of them was killed."""
    folder = tmp_path_factory.mktemp("two")
    for name in METHODS:
        write(folder, name, family)
    write(folder, "killed", family, "nan_ties")
    done = python(ROOT / "tests/processes/merges.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    # Adapters name the folder of their base.
    texts = {path: path.read_bytes().replace(os.fsencode(folder), b"") for path in found}
    return {str(path.relative_to(folder)): text for path, text in texts.items()}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_bytes_of_one(alone, pairs, name):
    one, two = files(alone / name), files(pairs / name)
    assert list(one) == list(two)
    assert [path for path in one if one[path] != two[path]] == []
    # Both have done their share, and the main one's listeners got each event once.
    main, other = (int((pairs / f"{name}.{rank}.count").read_text()) for rank in (0, 1))
    assert main > 2 and other > 2
    blocks = METHODS[name][0] in ("flexmerge", "decompose")
    merged = "block_merged" if blocks else "tensor_merged"
    lines = map(json.loads, (pairs / f"{name}.jsonl").read_text().splitlines())
    heard = [event["name"] for event in lines if event["event"] == merged]
    assert len(set(heard)) == len(heard) == main + other


def test_a_merge_goes_on_after_a_process_was_killed(alone, pairs, capfd):
    out = pairs / "killed" / "out"
    assert not out.exists()
    # What either process has finished is on the disk, however the other one ended.
    mergekit_ext.merge(pairs / "killed.yml", out, MergeOptions(copy_tokenizer=False))
    assert "Going on with a merge that was stopped" in capfd.readouterr().err
    assert files(alone / "nan_ties") == files(pairs / "killed")


def test_a_tensor_that_is_not_finite_stops_all(alone, family, tmp_path):
    base, tuned = family
    written = read_safetensors(alone / "nan_dare_ties" / "out" / "model.safetensors")
    two = Ranks(0, 2)
    owners = two.share([header.nbytes for header in written.values()])
    name = next(name for name, owner in zip(written, owners, strict=True) if owner == 1)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_bytes((tuned[0] / "config.json").read_bytes())
    tensors = load_file(tuned[0] / "model.safetensors")
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    content = models.config("nan_dare_ties", [bad, *tuned[1:]], base, {"density": 0.5})
    config = models.write_yaml(tmp_path / "config.yml", content)
    place = tmp_path / "place"
    flags = ["--quiet", "--no-copy-tokenizer"]
    done = python(*TORCHRUN, "-m", "mergekit_ext", "merge", config, place / "out", *flags)
    assert done.returncode != 0 and not (place / "out").exists()
    assert f"Error: {name} of model {bad}: found 1 non-finite value" in done.stderr
    assert done.stderr.count("Traceback") == 1  # the launcher's
