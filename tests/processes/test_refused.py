"""What several processes cannot do is said once."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml

import mergekit_ext
from mergekit_ext import parallel
from mergekit_ext.cli import main
from mergekit_ext.errors import ConfigError, RankError
from mergekit_ext.host.session import output
from mergekit_ext.parallel import Ranks
from tests import models


@pytest.fixture(params=[0, 1])
def launched_as(request, monkeypatch):
    """This process, as the launcher of two has started it."""
    values = {"WORLD_SIZE": "2", "RANK": str(request.param), "LOCAL_RANK": str(request.param)}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture
def config(tmp_path):
    base, tuned = models.family(tmp_path, models.llama, amounts=(0.1, 0.2))
    return models.write_yaml(tmp_path / "nan.yml", models.config("nan", tuned, base))


def said_once(done, rank, message):
    if rank == 0:
        assert done.exit_code == 2 and message in done.output
    else:
        # The launcher would stop the first before it has said so.
        assert done.exit_code == 0 and not done.output


@pytest.mark.parametrize("command", [["check"], ["export", "b", "out"]], ids=lambda words: words[0])
def test_commands_that_do_not_share_their_work(launched_as, tmp_path, command):
    (tmp_path / "any").touch() if command == ["check"] else (tmp_path / "any").mkdir()
    name, *rest = command
    done = CliRunner().invoke(main, [name, str(tmp_path / "any"), *rest], prog_name="mergekit-ext")
    said_once(done, launched_as, f"2 processes for mergekit-ext {name}; expected one process")


def test_stock_commands_with_a_method_of_ours(launched_as, config, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(mergekit_yaml, [str(config), str(out), "--no-copy-tokenizer"])
    said_once(done, launched_as, "-m mergekit_ext merge CONFIG OUT")
    assert not out.exists()


def test_what_several_processes_cannot_do_is_one_list(config, tmp_path):
    """The main of two processes, of which the other one has come everywhere with the same."""
    tuned = [config.parent / f"tuned{number}" for number in range(2)]
    own = models.config("linear", tuned, parameters={"weight": 1})
    own = models.write_yaml(tmp_path / "own.yml", own)
    options = MergeOptions(safe_serialization=False, multi_gpu=True, device="cuda:1")
    pair = Main()
    with parallel.joined(pair), pytest.raises(ConfigError) as found:
        mergekit_ext.merge(own, tmp_path / "out", options)
    said = [str(problem) for problem in found.value.problems]
    for expected in (
        "merge_method: .* in 2",
        "--no-safe.* in 2",
        "--multi",
        "--device: .*own",
    ):
        assert any(re.match(expected, problem) for problem in said)


class Main(Ranks):
    """The main one of two processes, of which the other one has sent what it has, or the same."""

    def __init__(self, other=None):
        super().__init__(0, 2)
        self.other = other

    def _exchange(self, value):
        return [value, self.other.sent if self.other else value]


class Other(Ranks):
    """The second of two processes, whose main one has ended or has come to the same call."""

    def __init__(self, main_ended):
        super().__init__(1, 2)
        self.main_ended = main_ended

    def _exchange(self, value):
        self.sent = value
        if self.main_ended:
            raise RankError
        return [value, value]


@pytest.mark.parametrize("main_ended", [True, False])
def test_a_problem_that_the_main_process_has_too_is_said_once(monkeypatch, tmp_path, main_ended):
    monkeypatch.setattr(
        "mergekit_ext.cli.merge.launched", lambda: parallel.joined(Other(main_ended))
    )
    (tmp_path / "empty.yml").touch()
    done = CliRunner().invoke(main, ["merge", str(tmp_path / "empty.yml"), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert ("1 problem with this configuration" in done.output) is not main_ended


def test_a_problem_of_another_process_alone_ends_the_main_one(monkeypatch, tmp_path):
    other = Other(main_ended=False)
    monkeypatch.setattr("mergekit_ext.cli.merge.launched", lambda: parallel.joined(other))
    (tmp_path / "empty.yml").touch()
    CliRunner().invoke(main, ["merge", str(tmp_path / "empty.yml"), str(tmp_path / "out")])
    with pytest.raises(RankError):
        Main(other).gather({"configuration": "1"})


def test_a_process_that_has_no_folder_yet_does_not_say_what_is_kept(tmp_path):
    merge = output(MergeOptions(quiet=True), str(tmp_path / "out"), None, [])
    with parallel.joined(Other(main_ended=True)), pytest.raises(RankError) as found, merge:
        pass
    assert str(found.value).endswith("its own message says why")
