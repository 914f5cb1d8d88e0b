from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_ext.errors import ConfigError
from mergekit_ext.host.staging import (
    output_problems,
    resumable,
    shards,
    space_problems,
    staged,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_output_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        (folder / "model.safetensors").write_text("new")
        assert folder.name == "out"
        assert not out.exists()
    assert names(out) == ["model.safetensors"]
    assert names(tmp_path / "deep") == ["out"]


def test_the_configuration_of_an_earlier_output_goes_before_new_weights_come(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (out / name).write_text("old")
    moved, move = [], type(out).replace

    def noted(path, destination):
        moved.append(path.name)
        return move(path, destination)

    monkeypatch.setattr(type(out), "replace", noted)
    with staged(out) as folder:
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            (folder / name).write_text("new")
    assert moved[-1] == "model.safetensors"
    assert len(moved) == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "out") as folder:
        (folder / "model.safetensors").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_failure_leaves_an_earlier_output_as_it_was(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    with pytest.raises(ValueError), staged(out) as folder:
        (folder / "model.safetensors").write_text("half")
        raise ValueError
    assert (out / "model.safetensors").read_text() == "old"


def test_replaces_the_weights_of_an_earlier_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    old = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "notes.txt",
    )
    others = ("model_ema.safetensors", "model-notes.safetensors", "adapter_model.safetensors")
    for name in (*old, *others):
        (out / name).write_text("old")
    with staged(out) as folder:
        (folder / "model.safetensors").write_text("new")
    assert names(out) == sorted(["model.safetensors", "notes.txt", *others])
    assert [path.name for path in shards(out)] == ["model.safetensors"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert names(tmp_path / "out") == ["config.json"]


def test_a_kill_while_files_move_leaves_no_mixture(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    parts = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in (*parts, "model.safetensors.index.json"):
        (out / name).write_text("old")
    move = type(out).replace

    def killed(path, destination):
        if path.name == parts[1]:
            raise KeyboardInterrupt
        return move(path, destination)

    monkeypatch.setattr(type(out), "replace", killed)
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:
        for name in (*parts, "model.safetensors.index.json"):
            (folder / name).write_text("new")
    assert names(out) == [parts[0]]
    assert (out / parts[0]).read_text() == "new"


def test_places_that_an_output_cannot_have(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("input")
    (model / "other.safetensors").write_text("input")

    def found(out, *inputs):
        return [problem.found for problem in output_problems(out, inputs)]

    assert found(tmp_path / "new" / "out", model) == []
    assert found(tmp_path, model, "org/name") == []
    assert "where the input" in found(model, model)[0]
    assert "where the input" in found(model, model / "model.safetensors")[0]
    assert found(model, model / "other.safetensors") == []
    assert "is a file" in found(model / "model.safetensors")[0]
    assert "cannot be made" in found(model / "model.safetensors" / "out")[0]
    assert "cannot be made" in found(tmp_path / ("x" * 300) / "out")[0]
    assert "cannot be made" in found(tmp_path / "new" / ("x" * 300))[0]
    (tmp_path / "circle").symlink_to("circle")
    assert "cannot be made" in found(tmp_path / "circle" / "out")[0]
    assert names(tmp_path) == ["circle", "model"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can write in")
def test_a_folder_that_cannot_be_written_whatever_its_permissions():
    (problem,) = output_problems("/proc/no/out", ())
    assert problem.where == "OUT_PATH"
    assert "cannot be made" in problem.found


def test_a_long_name_is_no_obstacle(tmp_path):
    out = tmp_path / ("x" * 250)
    assert list(output_problems(out, ())) == []
    with staged(out) as folder:
        (folder / "config.json").write_text("{}")
    assert names(tmp_path) == [out.name]


KILLED = """
import os, signal, sys
from mergekit_ext.errors import ConfigError
from mergekit_ext.host.staging import staged
with staged(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_text("half")
    if sys.argv[2] == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="no locks that end with a process")
def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    for name in ("out", "other"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name, "now"], check=False)
    assert len(names(tmp_path)) == 2
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    left, out = names(tmp_path)
    assert out == "out"
    assert left.startswith(".other-")
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.skipif(os.name == "nt", reason="no locks that end with a process")
def test_what_a_running_process_writes_stays(tmp_path):
    arguments = [sys.executable, "-c", KILLED, tmp_path / "out", "wait"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"ready\n"
        (room,) = tmp_path.iterdir()
        with pytest.raises(ConfigError, match="another process"), staged(tmp_path / "out"):
            pass
        assert (room / "out" / "model.safetensors").exists()
        running.kill()
    with staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_an_output_that_does_not_fit(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    (problem,) = space_problems(tmp_path / "a" / "b", free * 2)
    assert str(tmp_path) in problem.found
    assert f"{free * 2:,} bytes" in problem.expected
    assert list(space_problems(tmp_path / "a" / "b", free // 2)) == []
    assert list(space_problems("a\0b", free * 2)) == []


def test_what_is_left_counts_as_free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    target = tmp_path / "out"
    assert len([*space_problems(target, 50_000)]) == 1
    with (
        pytest.raises(KeyboardInterrupt),
        resumable(target, {"a": "b"}, restart=False) as room,
    ):
        (room.path / "piece").write_bytes(b"1" * 50_000)
        raise KeyboardInterrupt
    assert list(space_problems(target, 50_000)) == []
    assert len([*space_problems(target, 500_000)]) == 1
    assert len([*space_problems(tmp_path / "other", 50_000)]) == 1


def test_a_disk_that_does_not_say(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(total=0, used=0, free=0))
    assert list(space_problems(tmp_path / "out", 1000)) == []
