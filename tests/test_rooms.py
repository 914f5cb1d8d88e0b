"""Rooms that outlive what stopped a merge, and who goes on in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mergekit_ext.errors import ConfigError
from mergekit_ext.rooms import hidden_room, is_room, lasting_room

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no locks that end with a process")

IDENTITY = {"configuration": "a", "input x": "b"}
# Enters when it is told to, and leaves when it is told to.
SCRIPT = """
import sys
from pathlib import Path
from mergekit_ext.errors import ConfigError
from mergekit_ext.rooms import hidden_room

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
