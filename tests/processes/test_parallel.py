"""How processes share work, meet and end: as threads, and as processes of a launcher."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as distributed
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.errors import ConfigError, MergeError, RankError
from mergekit_ext.parallel import Ranks, current, launched, launched_size, own_device
from tests.processes.launching import ROOT, python
from tests.processes.together import together

SOUND = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "9"}


@pytest.fixture
def launcher(monkeypatch):
    for name, value in SOUND.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@given(st.lists(st.integers(0, 1000)), st.integers(1, 8))
def test_shares_are_balanced_within_the_largest_piece(sizes, processes):
    ranks = Ranks(0, processes)
    owners = ranks.share(sizes)
    loads = [0] * processes
    for owner, size in zip(owners, sizes, strict=True):
        loads[owner] += size
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert sum(loads) == sum(sizes)
    assert owners == ranks.share(list(sizes))


def test_values_and_messages_arrive_once_and_in_order():
    def work(us):
        found = []
        for turn in range(3):
            us.post((us.rank, turn))
            found.append(us.gather((us.rank, turn)))
        return found, us.received(), us.received()

    found, messages, later = zip(*together(work, size=3), strict=True)
    assert found == ([[(rank, turn) for rank in range(3)] for turn in range(3)],) * 3
    assert messages == ([(rank, turn) for turn in range(3) for rank in range(3)], [], [])
    assert later == ([], [], [])


def test_what_the_main_process_makes_is_made_once():
    made = []

    def work(us):
        return us.from_main(lambda: made.append(us.rank) or "made")

    assert together(work) == ["made", "made"] and made == [0]


def test_the_end_of_one_ends_the_others():
    def work(us):
        if us.rank == 1:
            raise MergeError("no such thing")
        us.wait()

    main, other, third = together(work, size=3)
    assert isinstance(other, MergeError)
    assert isinstance(main, RankError) and isinstance(third, RankError)


def test_whoever_parts_ends_what_the_others_gather():
    def work(us):
        if us.rank:
            us.part()
            raise MergeError("found here only")
        return us.gather({"a": 1})

    main, *others = together(work, size=3)
    assert isinstance(main, RankError) and [type(error) for error in others] == [MergeError] * 2


def test_two_processes_talk_and_a_killed_one_ends_the_other():
    done = python(ROOT / "tests/processes/toy.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RankError: another process of this merge stopped") == 2


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as us:
        assert us is current() and us.size == 1


def test_each_process_has_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank, expected in enumerate(["cuda:0", "cuda:1", "cuda:0"]):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert own_device("cuda") == expected
    assert taken == [0, 1, 0]
    assert own_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *(("WORLD_SIZE", found) for found in ("many", "0", "-1", "", "9" * 5000, "\u0662")),
        *(("RANK", found) for found in (None, "x", "", "-1", "2", "\u0661")),
        *(("LOCAL_RANK", found) for found in (None, "x", "2")),
    ],
)
def test_what_no_launcher_sets_is_refused(launcher, name, found):
    assert launched_size() == 2
    launcher.delenv(name) if found is None else launcher.setenv(name, found)
    with pytest.raises(ConfigError, match=f"1 problem[^\n]*\n  1. {name}: found"):
        launched_size()


def test_a_process_that_never_connects_is_a_problem(launcher):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = distributed.TCPStore("127.0.0.1", port, is_master=True)  # as torchrun has one
    launcher.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launcher.setenv("MASTER_ADDR", "127.0.0.1")
    launcher.setenv("MASTER_PORT", str(agent.port))
    launcher.setattr("mergekit_ext.parallel._MEETING", timedelta(seconds=1))
    with pytest.raises(ConfigError, match="expected all processes to meet there"), launched():
        pass
    assert not distributed.is_initialized()


@pytest.mark.parametrize(
    ("name", "found"), [("MASTER_PORT", "abc"), ("MASTER_PORT", "65536"), ("MASTER_ADDR", None)]
)
def test_a_place_where_processes_cannot_meet_is_a_problem(launcher, name, found):
    launcher.delenv(name) if found is None else launcher.setenv(name, found)
    with pytest.raises(ConfigError, match="expected all processes to meet there"), launched():
        pass
    assert not distributed.is_initialized()
