"""Rooms that outlive what stopped a merge, and who goes on in them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from mergekit_ext.errors import ConfigError
from mergekit_ext.io import rooms
from mergekit_ext.io.rooms import hidden_room, is_room, lasting_room, left_bytes

fcntl = pytest.importorskip("fcntl", reason="no locks that end with a process")

IDENTITY = {"configuration": "a", "input x": "b"}
# Enters when it is told to, and leaves when it is told to.
SCRIPT = """
import sys
from pathlib import Path
from mergekit_ext.errors import ConfigError
from mergekit_ext.io.rooms import hidden_room

target = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with hidden_room(target, target.parent):
        print("wrote", flush=True)
        sys.stdin.readline()
except ConfigError:
    print("in use", flush=True)
"""


def stopped(target, identity=IDENTITY, error=OSError, piece="half"):
    with pytest.raises(error), lasting_room(target, target.parent, identity, keeps) as room:
        (room.path / "piece").write_text(piece)
        raise error


def keeps(error):
    return isinstance(error, OSError)


def entered(target, identity=IDENTITY, restart=False):
    with lasting_room(target, target.parent, identity, keeps, restart) as room:
        return room, sorted(path.name for path in room.path.iterdir() if path.name[0] != ".")


def test_the_same_goes_on(tmp_path):
    stopped(tmp_path / "out")
    room, files = entered(tmp_path / "out")
    assert (room.taken_over, room.changed, files) == (True, (), ["identity.json", "piece"])
    assert list(tmp_path.iterdir()) == []
    assert not entered(tmp_path / "out")[0].taken_over


@pytest.mark.parametrize("identity", [{**IDENTITY, "input x": "c"}, {"configuration": "a"}])
def test_another_identity_starts_over_and_says_what_differs(tmp_path, identity):
    stopped(tmp_path / "out")
    room, files = entered(tmp_path / "out", identity)
    assert (room.taken_over, room.changed, files) == (False, ("input x",), ["identity.json"])
    assert list(tmp_path.iterdir()) == []


def test_restart_starts_over_without_a_reason(tmp_path):
    stopped(tmp_path / "out")
    room, files = entered(tmp_path / "out", restart=True)
    assert (room.taken_over, room.changed, files) == (False, (), ["identity.json"])


def test_an_error_that_is_not_kept_leaves_nothing(tmp_path):
    stopped(tmp_path / "out", error=ValueError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "enter", [entered, lambda target: hidden_room(target, target.parent).__enter__()]
)
def test_a_place_in_use_is_refused(tmp_path, enter):
    target = tmp_path / "out"
    stopped(target)
    with lasting_room(target, tmp_path, IDENTITY, keeps) as room:
        assert room.taken_over
        with pytest.raises(ConfigError, match="another process that is writing it") as refused:
            enter(target)
        assert str(room.path) in str(refused.value)
        assert (room.path / "piece").exists()
    assert list(tmp_path.iterdir()) == []
    entered(target)


def test_of_several_that_start_at_once_one_writes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, str(script), str(place / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started = [subprocess.Popen(command, **pipes) for _ in range(4)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 4
    for process in started:
        process.stdin.write("\n")
    said = sorted(process.stdout.readline() for process in started)
    for process in started:
        process.communicate("\n", timeout=60)
    assert said == ["in use\n"] * 3 + ["wrote\n"]
    assert list(place.iterdir()) == []


def test_long_names_that_begin_alike_are_different_places(tmp_path):
    one, other = tmp_path / ("n" * 60 + "1"), tmp_path / ("n" * 60 + "2")
    stopped(one)
    with hidden_room(other, tmp_path), lasting_room(one, tmp_path, IDENTITY, keeps) as room:
        assert room.taken_over


@pytest.mark.parametrize("content", ["", "[]", '{"configuration": "a"', "5"])
def test_a_torn_identity_is_none(tmp_path, content):
    stopped(tmp_path / "out")
    (room,) = tmp_path.iterdir()
    (room / "identity.json").write_text(content)
    assert not entered(tmp_path / "out")[0].taken_over
    assert list(tmp_path.iterdir()) == []


def test_other_rooms_are_left_and_ordinary_ones_remove_what_is_left(tmp_path):
    stopped(tmp_path / "other")
    stopped(tmp_path / "out")
    with hidden_room(tmp_path / "out", tmp_path):
        pass
    (left,) = tmp_path.iterdir()
    assert is_room(left)
    assert not is_room(tmp_path)
    assert json.loads((left / "identity.json").read_text()) == IDENTITY


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
@pytest.mark.parametrize("name", [".lock", "identity.json"])
def test_what_is_no_file_of_ours_is_neither_waited_for_nor_followed(tmp_path, name, kind):
    place = tmp_path / "place"
    place.mkdir()
    stopped(place / "out")
    (room,) = place.iterdir()
    (room / name).rename(tmp_path / "elsewhere")
    {
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "folder": os.mkdir,
    }[kind](room / name)
    with hidden_room(place / "other", place):
        pass
    assert not entered(place / "out")[0].taken_over
    assert (tmp_path / "elsewhere").exists()
    # Without a lock of ours it is not our room.
    assert list(place.iterdir()) == ([room] if name == ".lock" else [])


def test_a_link_to_a_room_and_rooms_of_others_are_left(tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    stopped(place / "out")
    (room,) = place.iterdir()
    room.rename(tmp_path / "kept")
    room.symlink_to(tmp_path / "kept")
    assert not entered(place / "out")[0].taken_over
    assert (tmp_path / "kept" / "piece").exists()
    room.unlink()
    (tmp_path / "kept").rename(room)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not entered(place / "out")[0].taken_over
    assert (room / "piece").exists()


def test_without_locks_everybody_starts_over(tmp_path, monkeypatch):
    stopped(tmp_path / "out")

    def none_here(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    room, files = entered(tmp_path / "out")
    assert (room.taken_over, files) == (False, ["identity.json"])
    (left,) = tmp_path.iterdir()
    assert (left / "piece").exists()


def test_a_room_that_is_half_removed_goes_with_the_next_one(tmp_path, monkeypatch):
    stopped(tmp_path / "out", piece="p" * 10_000)
    assert left_bytes(tmp_path / "out", tmp_path) > 0
    removed, rmtree = [], shutil.rmtree

    def killed(path, **options):
        removed.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        entered(tmp_path / "out", restart=True)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    (left,) = tmp_path.iterdir()
    assert removed == [left]
    assert [path.name for path in left.iterdir()] == [".lock"]
    assert not entered(tmp_path / "out")[0].taken_over
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_a_folder_of_the_same_name_is_another_place(tmp_path):
    outer = tmp_path / "m"
    outer.mkdir()
    stopped(outer / "m")
    assert left_bytes(outer, outer) == 0
    with lasting_room(outer, outer, IDENTITY, keeps) as room:  # which exists
        assert not room.taken_over
    assert entered(outer / "m")[0].taken_over


def test_a_room_moves_with_the_folder_that_it_is_in(tmp_path):
    (tmp_path / "a").mkdir()
    stopped(tmp_path / "a" / "out")
    (tmp_path / "a").rename(tmp_path / "b")
    assert entered(tmp_path / "b" / "out")[0].taken_over


def test_an_output_that_was_made_meanwhile_is_a_reason(tmp_path):
    target = tmp_path / "out"
    stopped(target)
    target.mkdir()
    with lasting_room(target, target, IDENTITY, keeps) as room:
        assert (room.taken_over, room.changed) == (False, ("a folder at the output's place",))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_who_holds_the_folder_for_long_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "_PATIENCE", 0.1)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        assert not entered(tmp_path / "out")[0].taken_over
    finally:
        os.close(holder)
