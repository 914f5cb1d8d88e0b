"""Merges under a cap on memory: they stay below it, or are refused before a weight is read."""

from __future__ import annotations

import pytest

from mergekit_ext import memory
from mergekit_ext.errors import ConfigError
from mergekit_ext.kernels import footprint
from mergekit_ext.kernels.footprint import Work
from tests.limits.names import NAMES
from tests.limits.told import told_by

pytestmark = pytest.mark.skipif(not memory.held(), reason="the system does not tell what is held")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What became of every merge; those of one process after the other."""
    lines, stderr = told_by("caps", tmp_path_factory.mktemp("caps"))
    return {line["name"]: line | {"stderr": stderr} for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_an_accepted_merge_stays_below_its_cap(told, name):
    found = told[name]
    assert found["accepted"]["code"] == 0 and found["written"], found["stderr"][-2000:]
    assert found["accepted"]["most"] < found["cap"]


def test_a_model_may_be_larger_than_the_cap(told):
    found = told["larger than its cap"]
    assert found["accepted"]["code"] == 0 and found["written"], found["stderr"][-2000:]
    assert found["accepted"]["most"] < found["cap"] < found["inputs"] / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_that_needs_more_is_refused(told, name):
    found = told[name]
    assert found["refused"] == 2
    assert not found["left"]
    assert "Traceback" not in found["stderr"]


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_not_absurd(told, name):
    found = told[name]
    added = found["accepted"]["most"] - found["accepted"]["before"]
    assert added >= found["need"] / 3


def test_the_refusal_says_what_needs_how_much(monkeypatch):
    work = Work((1 << 15, 1 << 12), models=3, based=False)
    parts = footprint.lore(work)
    monkeypatch.setenv(memory.VARIABLE, "2GB")
    (problem,) = memory.problems(memory.Need("model.embed_tokens.weight", parts, {}, "Use less."))
    assert problem.where == memory.VARIABLE
    assert problem.found.startswith("2GB, while model.embed_tokens.weight needs ")
    for what in parts:
        assert what in problem.found
    assert problem.remedy == "Use less."
    assert problem.expected.endswith("GB or more")
    with memory.limited(problem.expected.removesuffix(" or more")):
        assert not list(memory.problems(memory.Need("x", parts)))


def test_an_accelerator_has_the_same_cap():
    need = memory.Need("x", {}, {"inputs": 3 * 10**9})
    with memory.limited("2GB"):
        (problem,) = memory.problems(need)
    assert "on the device" in problem.found and "--max-memory" in problem.where


@pytest.mark.parametrize("text", ["8", "much", "-1GB", "8 G"])
def test_what_is_no_size_is_refused(text, monkeypatch):
    with pytest.raises(ConfigError, match="--max-memory"), memory.limited(text):
        pass
    monkeypatch.setenv(memory.VARIABLE, text)
    (problem,) = memory.problems(memory.Need("x"))
    assert problem.where == memory.VARIABLE


def test_without_a_cap_nothing_is_refused(monkeypatch):
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    assert not list(memory.problems(memory.Need("x", {"a matrix": 1 << 60})))
