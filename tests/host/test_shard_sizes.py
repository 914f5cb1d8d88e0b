"""``--out-shard-size`` of every command, mergekit's own with a stock method included."""

from __future__ import annotations

import importlib

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import mergekit_ext
from mergekit_ext.core.memory import shard_size
from tests import models as small

mergekit_ext.register()

COMMANDS = {
    "mergekit-yaml": ("mergekit.scripts.run_yaml", "main"),
    "mergekit-multi": ("mergekit.scripts.multimerge", "main"),
    "mergekit-pytorch": ("mergekit.scripts.merge_raw_pytorch", "main"),
    "mergekit-tokensurgeon": ("mergekit.scripts.tokensurgeon", "main"),
    "merge": ("mergekit_ext.cli.merge", "merge"),
    "check": ("mergekit_ext.cli.check", "check"),
    "analyze": ("mergekit_ext.cli.analyze", "analyze"),
    "sizes": ("mergekit_ext.cli.sizes", "sizes"),
}


@pytest.mark.parametrize("size", ["8XB", "", "-1", "MB", "many", "1e9", "0GB"])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="expected a size in bytes"):
        shard_size(size)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_size_is_one_message(name, tmp_path):
    size = "8XB"
    module, attribute = COMMANDS[name]
    command = getattr(importlib.import_module(module), attribute)
    (tmp_path / "merge.yml").write_text("models: []\n")
    places = ["-I", str(tmp_path / "out")] if name == "mergekit-multi" else [str(tmp_path / "out")]
    given_places = [] if name == "check" else places
    arguments = [str(tmp_path / "merge.yml"), *given_places, f"--out-shard-size={size}"]
    if name == "mergekit-tokensurgeon":
        arguments.insert(0, str(tmp_path))
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert f"found {size!r}; expected a size in bytes" in " ".join(result.output.split())


@pytest.mark.parametrize("method", ["linear", "nan"])
def test_shards_are_no_larger(method, tmp_path):
    size = "20 KB"
    _, tuned = small.family(tmp_path, small.llama)
    parameters = {"weight": 1.0}
    yml = small.write_yaml(tmp_path / "merge.yml", small.config(method, tuned, None, parameters))
    command = importlib.import_module("mergekit.scripts.run_yaml").main
    flags = ["--no-write-model-card", "--quiet", f"--out-shard-size={size}"]
    result = CliRunner().invoke(command, [str(yml), str(tmp_path / "out"), *flags])
    assert result.exit_code == 0, result.output
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        tensors = small.load_file(shard).values()
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors) <= 20_000


@given(st.integers(1, 10**6), st.sampled_from("kKmMbB"))
def test_one_letter_is_mergekits(number, letter):
    from mergekit.common import parse_kmb

    assert shard_size(f"{number}{letter}") == parse_kmb(f"{number}{letter}")
    assert shard_size(number) == shard_size(str(number)) == number


def test_units():
    assert {shard_size(s) for s in ("20KB", "20k", "20000", "20 kb", "0.02MB")} == {20_000}
    assert shard_size("8MB") == 8_000_000
    assert shard_size("8MiB") == 8 << 20
    assert shard_size("5GB") == shard_size("5B") == 5_000_000_000
    assert shard_size("1.5 gib") == 3 << 29
