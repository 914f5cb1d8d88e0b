"""The installed commands, in processes of their own and with little memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.attacks import texts
from tests.attacks.weights import ATTACKS, malicious_checkpoint
from tests.models import config, write_yaml

# Address space: torch and what it loads take some 5 GB of it, and little of that is memory.
_ADDRESSES = 12 << 30


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = Path(sysconfig.get_path("scripts")) / name
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES)),
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert "expected" in text
    return text


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of addresses")
def test_a_header_of_a_petabyte_takes_no_memory(inputs: Path, tmp_path: Path) -> None:
    file = inputs / "adapter1" / "adapter_model.safetensors"
    file.write_bytes(ATTACKS["shape of 10^15 elements"](file.read_bytes()))
    models = [inputs / "adapter0", inputs / "adapter1"]
    where = write_yaml(tmp_path / "m.yml", config("linear", models))
    assert "no safetensors file" in refused(run("peft-merge", where, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_bomb_of_aliases(tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_bytes(texts.YAML["billion laughs"])
    assert "aliases" in refused(run("mergekit-yaml", tmp_path / "m.yml", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_pickle_in_the_place_of_a_shard(inputs: Path, tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    for file in (inputs / "flex" / "shards").iterdir():
        file.write_bytes(malicious_checkpoint(owned))
    refused(run("mergekit-ext", "export", inputs / "flex", "tuned0", tmp_path / "out"))
    assert not owned.exists()
    assert not (tmp_path / "out").exists()
