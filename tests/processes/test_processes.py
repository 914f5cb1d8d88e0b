from __future__ import annotations

import pytest
import torch
import torch.distributed as distributed
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.errors import ConfigError, MergeError, RankError
from mergekit_ext.launch import launched, launched_size, own_device
from mergekit_ext.processes import Processes
from mergekit_ext.ranks import Ranks, current
from tests.processes.launching import ROOT, by_hand
from tests.processes.together import together

TOY = ROOT / "tests/processes/toy.py"


@given(st.lists(st.integers(0, 1000)), st.integers(1, 8))
def test_shares_are_balanced_within_the_largest_piece(sizes, processes):
    ranks = Ranks()
    ranks.size = processes
    owners = ranks.share(sizes)
    loads = [0] * processes
    for owner, size in zip(owners, sizes, strict=True):
        loads[owner] += size
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert sum(loads) == sum(sizes)
    assert owners == ranks.share(list(sizes))


def test_values_of_all_come_to_all_in_order():
    found = together(lambda us: [us.gather((us.rank, turn)) for turn in range(3)], size=3)
    assert found == [[[(rank, turn) for rank in range(3)] for turn in range(3)]] * 3


def test_what_the_main_process_makes_is_made_once():
    made = []

    def work(us):
        return us.from_main(lambda: made.append(us.rank) or "made")

    assert together(work) == ["made", "made"] and made == [0]


def test_an_error_of_one_stops_the_others_with_its_reason():
    def work(us):
        if us.rank == 1:
            raise MergeError("no such thing")
        us.wait()

    main, other, third = together(work, size=3)
    assert isinstance(other, MergeError)
    for heard in (main, third):
        assert isinstance(heard, RankError)
        assert str(heard) == "rank 1 stopped: no such thing" and not heard.resumable


def test_an_error_of_the_main_process_while_others_wait_for_what_it_makes():
    def work(us):
        return us.from_main(lambda: 1 / 0)

    main, other = together(work)
    assert isinstance(main, ZeroDivisionError)
    assert str(other) == "rank 0 stopped: ZeroDivisionError: division by zero" and other.resumable


def test_who_gives_no_sign_of_life_is_named(monkeypatch):
    monkeypatch.setattr("mergekit_ext.processes._LAST_SIGN", 0.2)
    monkeypatch.setattr("mergekit_ext.processes._BEAT", 0.1)
    ranks = Processes(distributed.HashStore(), 0, 2)
    ranks.open()
    with pytest.raises(RankError, match="rank 1 stopped: no sign of life"):
        ranks.wait()
    ranks._closing.set()


def test_two_processes_talk_and_end_well():
    for process in by_hand(TOY, "talk"):
        message = process.communicate(timeout=60)[1]
        assert process.returncode == 0, message


def test_a_killed_process_stops_the_other_without_a_launcher():
    pairs = [by_hand(TOY, "die", VICTIM=str(victim)) for victim in (0, 1)]
    for victim, pair in enumerate(pairs):
        messages = [process.communicate(timeout=60)[1] for process in pair]
        assert pair[victim].returncode == -9
        assert pair[1 - victim].returncode == 3
        assert f"heard: rank {victim} stopped: " in messages[1 - victim]


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


SOUND = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "found",
    ["many", "0", "-1", "", "02", "9" * 20, "9" * 5000, "\u0662"],
    ids=["word", "none", "negative", "empty", "zero-two", "huge", "endless", "arabic"],
)
def test_a_world_of_no_size_is_refused(monkeypatch, found):
    for name, value in {**SOUND, "WORLD_SIZE": found}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        launched_size()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *(("RANK", found) for found in ("x", "", "-1", "00", "2", "\u0661")),
        *(("LOCAL_RANK", found) for found in ("x", "2")),
        *(("MASTER_PORT", found) for found in ("abc", "0", "65536", "99999999999999999999")),
        *(("MASTER_ADDR", found) for found in ("", " ")),
    ],
)
def test_what_no_launcher_sets_is_refused(monkeypatch, name, found):
    for variable, value in {**SOUND, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    assert launched_size() == 2
    monkeypatch.setenv(name, found)
    with pytest.raises(ConfigError, match=f"1 problem[^\n]*\n  1. {name}: found"):
        launched_size()


def test_what_torch_says_of_variables_is_an_error_of_ours(monkeypatch):
    for name, value in {**SOUND, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def rendezvous(*_, **__):
        raise ValueError("invalid literal")

    monkeypatch.setattr(distributed, "rendezvous", rendezvous)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:29500: found invalid literal"), launched():
        pass


def test_a_world_without_a_place_to_meet_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR"), launched():
        pass
