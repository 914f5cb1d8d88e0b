"""Outputs appear whole; what is left of one that was stopped is continued, or goes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_ext.errors import ConfigError
from mergekit_ext.io.staging import flush, new_folder, place_problems, staged

IDENTITY = {"configuration": "a", "input x": "b"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def filled(folder, *files, text="old"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text(text)
    return folder


def stopped(target, identity=IDENTITY, error=OSError):
    with pytest.raises(error), staged(target, identity) as staging:
        (staging.output / "piece").write_text("half")
        raise error
    return staging.path


def continued(target, identity=IDENTITY, restart=False):
    """What is found in a staging directory, and the reasons to start over."""
    with staged(target, identity, restart) as staging:
        return names(staging.output), staging.changed


def test_an_output_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as staging:
        filled(staging.output, "model.safetensors")
        assert staging.output.name == "out"
        assert not out.exists()
    assert names(out) == ["model.safetensors"]
    assert names(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("existing", [False, True])
def test_all_files_have_the_access_that_new_ones_have(tmp_path, mask, mode, existing):
    if existing:
        filled(tmp_path / "out", "model.safetensors", "notes.txt")
    before = os.umask(mask)
    try:
        with staged(tmp_path / "out") as staging:
            assert staging.replaces == existing
            save_file({"x": torch.zeros(2)}, staging.output / "model.safetensors")
            inner = filled(staging.output / "task", "config.json")
            (inner / "config.json").chmod(0o400)
            (inner / "model.safetensors").hardlink_to(staging.output / "model.safetensors")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    new = [path for path in (tmp_path / "out").rglob("*.*") if path.name != "notes.txt"]
    assert [path.stat().st_mode & 0o777 for path in new] == [mode] * 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    filled(tmp_path / "old", "model.safetensors")
    for out in (tmp_path / "deep" / "out", tmp_path / "old"):
        with pytest.raises(error), staged(out) as staging:
            filled(staging.output, "model.safetensors", text="half")
            raise error
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old" / "model.safetensors").read_text() == "old"


def test_the_weights_of_an_earlier_output_give_way(tmp_path):
    others = ("model_ema.safetensors", "adapter_model.safetensors", "notes.txt")
    out = filled(tmp_path / "out", *SHARDS, INDEX, *others)
    with staged(out) as staging:
        filled(staging.output, "model.safetensors", text="new")
    assert names(out) == sorted(["model.safetensors", *others])


def test_what_makes_a_folder_a_model_comes_last(tmp_path, monkeypatch):
    files = ("config.json", *SHARDS, INDEX, "adapter_config.json", "tokenizer.json")
    out, moved, rename = filled(tmp_path / "out", *files), [], os.rename

    def noted(path, destination):
        moved.append(Path(path).name)
        rename(path, destination)

    monkeypatch.setattr(os, "rename", noted)
    with staged(out) as staging:
        filled(staging.output, *files, text="new")
    assert sorted(moved[:2]) == ["config.json", "tokenizer.json"]
    assert sorted(moved[-2:]) == ["adapter_config.json", INDEX]


def test_a_kill_while_files_move_leaves_no_mixture(tmp_path, monkeypatch):
    out, rename = filled(tmp_path / "out", *SHARDS, INDEX), os.rename

    def killed(path, destination):
        if Path(path).name == SHARDS[1]:
            raise KeyboardInterrupt
        rename(path, destination)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt), staged(out) as staging:
        filled(staging.output, *SHARDS, INDEX, text="new")
    assert names(out) == [SHARDS[0]]
    assert (out / SHARDS[0]).read_text() == "new"


@pytest.mark.parametrize("mounted", [True, False], ids=["mounted", "read-only parent"])
def test_an_output_that_must_be_written_in_its_place(tmp_path, monkeypatch, mounted):
    out = filled(tmp_path / "out")
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with staged(out) as staging:
        filled(staging.output, "config.json")
        assert staging.path.parent == out
        assert list(place_problems(out, "OUT", empty=True)) == []
    assert names(out) == ["config.json"]


def test_long_names(tmp_path):
    one, other = (tmp_path / ("n" * 250 + end) for end in "12")
    stopped(one)
    with staged(other) as staging:
        filled(staging.output, "config.json")
    assert continued(one) == (["piece"], ())
    assert names(tmp_path) == [one.name, other.name]


@pytest.mark.parametrize(
    ("identity", "restart", "found"),
    [
        (IDENTITY, False, (["piece"], ())),
        (IDENTITY, True, ([], ())),
        ({**IDENTITY, "input x": "c"}, False, ([], ("input x",))),
        ({"configuration": "a"}, False, ([], ("input x",))),
    ],
)
def test_the_same_output_is_continued_and_another_starts_over(tmp_path, identity, restart, found):
    stopped(tmp_path / "other")
    left = stopped(tmp_path / "out")
    assert continued(tmp_path / "out", identity, restart) == found
    assert not left.exists()
    assert len(names(tmp_path)) == 2  # the output, and what is left of the other


def test_an_error_that_would_come_again_leaves_nothing(tmp_path):
    stopped(tmp_path / "deep" / "out", error=ValueError)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["", "[]", '{"configuration": "a"', "5"])
def test_a_torn_identity_is_none(tmp_path, content):
    (stopped(tmp_path / "out") / "identity.json").write_text(content)
    assert continued(tmp_path / "out") == ([], ())


def test_what_is_left_of_a_removal_is_not_continued(tmp_path, monkeypatch):
    left = stopped(tmp_path / "out")

    def killed(path, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        continued(tmp_path / "out", restart=True)
    assert names(left) == [".lock", "out"]
    assert continued(tmp_path / "out") == ([], ())
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("place", ["", ".lock", "identity.json", "out"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "file"])
def test_foreign_things_are_neither_waited_for_nor_followed(tmp_path, place, kind):
    parent = filled(tmp_path / "parent")
    hostile = stopped(parent / "out") / place
    hostile.rename(tmp_path / "elsewhere")
    {
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "folder": Path.mkdir,
        "file": Path.touch,
    }[kind](hostile)
    with pytest.raises((ConfigError, OSError)) if _refused(place, kind) else nullcontext():
        assert continued(parent / "out")[0] in ([], ["piece"])
    assert (tmp_path / "elsewhere").exists()


def _refused(place, kind):
    return (place, kind) in {
        *(("", kind) for kind in ("pipe", "link", "file")),
        *((".lock", kind) for kind in ("link", "folder")),
    }


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_the_staging_directory_of_another_user_is_left(tmp_path):
    left = stopped(tmp_path / "out")
    os.chown(left, 12345, -1)
    with pytest.raises(ConfigError, match="no folder of this user"):
        continued(tmp_path / "out")
    assert names(left / "out") == ["piece"]


def test_a_file_system_that_gives_all_files_one_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    stopped(tmp_path / "out")
    assert continued(tmp_path / "out") == (["piece"], ())
    assert names(tmp_path) == ["out"]


def test_a_folder_without_a_lock_is_not_emptied(tmp_path):
    left = stopped(tmp_path / "out")
    for name in (".lock", "identity.json"):
        (left / name).unlink()
    filled(left, "letters")
    with pytest.raises(ConfigError, match="no staging directory"):
        continued(tmp_path / "out")
    assert "letters" in names(left)


def test_an_empty_folder_is_replaced_at_once(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as staging:
        filled(staging.output, "config.json", "model.safetensors")
        written = staging.output.stat().st_ino
    assert (tmp_path / "out").stat().st_ino == written


def test_what_a_link_at_the_hidden_name_leads_to_is_not_counted(tmp_path, monkeypatch):
    left = stopped(tmp_path / "out")
    left.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "large").write_bytes(bytes(1 << 20))
    left.symlink_to(tmp_path / "elsewhere")
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=0))
    assert list(place_problems(tmp_path / "out", "OUT", needed=1000))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def none_here(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none_here)
    stopped(tmp_path / "out")
    with staged(tmp_path / "out", IDENTITY) as staging:
        assert names(staging.output) == ["piece"]
        with pytest.raises(ConfigError, match="another process"):
            continued(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# Begins an output when it is asked to, and ends as it is asked to.
SCRIPT = """
import os, signal, sys
from mergekit_ext.errors import ConfigError
from mergekit_ext.io.staging import staged

print("ready", flush=True)
sys.stdin.readline()
try:
    with staged(sys.argv[1]) as staging:
        (staging.output / "half").touch()
        print("wrote", flush=True)
        if sys.stdin.readline() == "kill\\n":
            os.kill(os.getpid(), signal.SIGKILL)
except ConfigError:
    print("in use", flush=True)
"""


def test_one_process_writes_and_what_a_killed_one_left_goes(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started = [subprocess.Popen(command, **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 3
    for process in started:
        process.stdin.write("\n")
    answers = [process.stdout.readline() for process in started]
    assert sorted(answers) == ["in use\n"] * 2 + ["wrote\n"]
    with pytest.raises(ConfigError, match="another process that is writing it"):
        continued(tmp_path / "out")
    writer = started[answers.index("wrote\n")]
    for process in started:
        process.communicate("kill\n", timeout=60)
    assert writer.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    assert continued(tmp_path / "out") == ([], ())
    assert names(tmp_path) == ["out"]


def test_files_are_flushed_before_the_folders_that_name_them(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    filled(tmp_path / "a", "one")
    filled(tmp_path / "a" / "b", "two")
    (tmp_path / "a" / "nowhere").symlink_to("there")
    flush(tmp_path / "a")
    place = {name: flushed.index((tmp_path / name).stat().st_ino) for name in ("a", "a/b", "a/one")}
    assert len(flushed) == 4
    assert place["a/one"] < place["a"] == 3
    assert place["a/b"] < place["a"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("write", [staged, lambda out: new_folder(out, "an adapter")])
def test_an_output_has_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch, write, existing):
    out, events = tmp_path / "out", []
    if existing:
        out.mkdir()
    sync, rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def moved(path, destination, **options):
        events.append("moved")
        rename(path, destination, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved)
    with write(out) as given:
        file = getattr(given, "output", given) / "model.safetensors"
        file.write_text("new")
        wanted = file.stat().st_ino
    assert events.index(wanted) < events.index("moved") < len(events) - 1


def test_a_disk_that_cannot_flush_is_believed_and_one_that_fails_is_not(tmp_path, monkeypatch):
    codes = [errno.EINVAL]

    def fsync(descriptor):
        raise OSError(codes[0], os.strerror(codes[0]))

    monkeypatch.setattr(os, "fsync", fsync)
    continued(tmp_path / "one")
    codes[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        continued(tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_places_that_an_output_cannot_have(tmp_path):
    model = filled(tmp_path / "model", "model.safetensors", "other.safetensors")
    (tmp_path / "circle").symlink_to("circle")

    def found(out, *inputs, **options):
        return [problem.found for problem in place_problems(out, "OUT", inputs, **options)]

    assert found(tmp_path / "new" / "out", model, empty=True) == []
    assert found(tmp_path, model, "org/name", "a\0b") == []
    assert found(model, model / "other.safetensors") == []
    assert found(tmp_path / ("x" * 250)) == []
    for out, source in [(model, model), (model, model / "model.safetensors")]:
        assert "where the input" in found(out, source)[0]
    assert "is a file" in found(model / "model.safetensors")[0]
    assert "is not empty" in found(model, empty=True)[0]
    assert found(model, without=["config.json"]) == []
    assert "another output (other.safetensors)" in found(model, without=names(model)[1:])[0]
    for out in (
        model / "model.safetensors" / "out",
        tmp_path / ("x" * 300) / "out",
        tmp_path / "new" / ("x" * 300),
        tmp_path / "circle" / "out",
        "/proc/no/out",
        "a\0b",
    ):
        assert "cannot be made" in found(out)[0]
    assert names(tmp_path) == ["circle", "model"]


def test_an_output_that_does_not_fit(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))

    def fits(out, needed):
        return not list(place_problems(tmp_path / out, "OUT", needed=needed))

    (problem,) = place_problems(tmp_path / "a" / "b", "OUT", needed=50_000)
    assert (str(tmp_path) in problem.found, "50,000 bytes" in problem.expected) == (True, True)
    assert fits("out", 900)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", IDENTITY) as staging:
        (staging.output / "piece").write_bytes(b"1" * 50_000)
        raise KeyboardInterrupt
    assert fits("out", 50_000)  # what is left is used, or removed
    assert not fits("out", 500_000)
    assert not fits("other", 50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(total=0, used=0, free=0))
    assert fits("other", 50_000)
