"""Processes that were not given the same do not merge."""

from __future__ import annotations

import threading

import pytest
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext import parallel
from mergekit_ext.errors import ConfigError
from mergekit_ext.host.identity import identity, require_same
from mergekit_ext.parallel import Ranks
from tests import models
from tests.processes.together import together


def test_the_same_is_no_error():
    require_same(Ranks(), {"a": "1"})
    assert together(lambda us: require_same(us, {"a": "1"}), size=3) == [None] * 3


def test_what_differs_is_named_with_its_ranks():
    given = [
        {"configuration": "1", "input a": "1"},
        {"configuration": "2", "input b": "1"},
        {"configuration": "2", "input b": "1"},
        {"configuration": "1", "input a": "1"},
        {"configuration": "1", "input a": "2"},
    ]
    for found in together(lambda us: require_same(us, given[us.rank]), size=5):
        assert isinstance(found, ConfigError) and len(found.problems) == 3
        for rank in (1, 2):
            assert f"rank {rank}: found another configuration, input a, input b;" in str(found)
        assert "rank 4: found another input a; expected what rank 0 was given" in str(found)


def test_what_does_not_decide_the_output_may_differ():
    one = MergeOptions(device="cuda:0", quiet=True, num_threads=1, verbosity=2)
    assert identity("", one, ()) == identity("", MergeOptions(device="cuda:1"), ())
    assert identity("", one, ()) != identity("", MergeOptions(device="cuda:1", random_seed=1), ())


@pytest.mark.parametrize("other", ["nan", "flexmerge"])
def test_two_configurations(tmp_path, monkeypatch, other):
    base, tuned = models.family(tmp_path, models.llama, amounts=(0.1, 0.2))
    parameters = {"target_size": 1.5} if other == "flexmerge" else {"scale": 0.5}
    configs = [
        models.write_yaml(tmp_path / "0.yml", models.config("nan", tuned, base)),
        models.write_yaml(tmp_path / "1.yml", models.config(other, tuned, base, parameters)),
    ]
    out = tmp_path / "out"
    (out / ".out-of-another-incomplete").mkdir(parents=True)
    mine = threading.local()
    monkeypatch.setattr(parallel, "current", lambda: mine.ranks)

    def merge(us):
        mine.ranks = us
        mergekit_ext.merge(configs[us.rank], out, MergeOptions(quiet=True, copy_tokenizer=False))

    for found in together(merge):
        assert isinstance(found, ConfigError)
        assert "rank 1: found another configuration; expected what rank 0 was given" in str(found)
    assert [path.name for path in out.iterdir()] == [".out-of-another-incomplete"]
