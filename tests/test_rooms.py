"""Rooms that outlive what stopped a merge, and who goes on in them."""

from __future__ import annotations

import json
import os

import pytest

from mergekit_ext.rooms import hidden_room, is_room, lasting_room

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no locks that end with a process")

IDENTITY = {"configuration": "a", "input x": "b"}


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


def test_a_room_in_use_is_nobody_elses(tmp_path):
    target = tmp_path / "out"
    stopped(target)
    with lasting_room(target, tmp_path, IDENTITY, keeps) as first:
        room, _ = entered(target)
        assert first.taken_over
        assert not room.taken_over
        assert room.path != first.path
        assert (first.path / "piece").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"configuration": "a"', "5"])
def test_a_torn_identity_is_none(tmp_path, content):
    stopped(tmp_path / "out")
    (room,) = tmp_path.iterdir()
    (room / "identity.json").write_text(content)
    assert not entered(tmp_path / "out")[0].taken_over
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_is_taken_and_the_rest_goes(tmp_path):
    target = tmp_path / "out"
    with lasting_room(target, tmp_path, IDENTITY, keeps):
        stopped(target)
        stopped(target, {"configuration": "z"})
    stopped(target)
    room, _ = entered(target)
    assert room.taken_over
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
