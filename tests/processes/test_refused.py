"""What several processes cannot do is said once."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml

import mergekit_ext
from mergekit_ext import ranks
from mergekit_ext.cli import main
from mergekit_ext.cli.shared import require_shareable
from mergekit_ext.errors import ConfigError
from tests import models


@pytest.fixture(params=[0, 1])
def launched_as(request, monkeypatch):
    """This process, as the launcher of two has started it."""
    values = {"WORLD_SIZE": "2", "RANK": str(request.param), "LOCAL_RANK": str(request.param)}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture
def pair():
    two = ranks.Ranks()
    two.size = 2
    with ranks.joined(two):
        yield


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


def test_commands_that_do_not_share_their_work(launched_as, tmp_path):
    done = CliRunner().invoke(main, ["check", str(tmp_path / "any.yml")])
    said_once(done, launched_as, "2 processes for mergekit-ext check; expected one process")


def test_stock_commands_with_a_method_of_ours(launched_as, config, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(mergekit_yaml, [str(config), str(out), "--no-copy-tokenizer"])
    said_once(done, launched_as, "-m mergekit_ext merge CONFIG OUT")
    assert not out.exists()


def test_options(pair):
    with pytest.raises(ConfigError) as found:
        require_shareable(MergeOptions(multi_gpu=True, device="cuda:1"))
    assert len(found.value.problems) == 2
    assert "--multi-gpu" in str(found.value) and "cuda:1" in str(found.value)
    require_shareable(MergeOptions(device="cuda"))


def test_what_mergekit_does_itself(pair, config, tmp_path):
    own = models.write_yaml(tmp_path / "own.yml", _linear(config))
    options = MergeOptions(quiet=True, safe_serialization=False)
    with pytest.raises(ConfigError) as found:
        mergekit_ext.merge(own, tmp_path / "out", options)
    text = str(found.value)
    assert "linear, which is mergekit's own" in text and "--no-safe-serialization" in text


def _linear(config):
    tuned = [config.parent / f"tuned{number}" for number in range(2)]
    return models.config("linear", tuned, parameters={"weight": 1})
