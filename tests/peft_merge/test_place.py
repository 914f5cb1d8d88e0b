"""Places that cannot be written: one problem, early where it can be known; nothing is left."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mergekit_ext.errors import ConfigError
from peft_merge.cli import main
from peft_merge.io.read import load_adapter
from peft_merge.io.write import save_adapter
from peft_merge.merge import merge_adapters
from tests.peft_merge.models import KINDS, saved


@pytest.fixture
def place(tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for i, name in enumerate(("one", "two")):
        saved(KINDS["plain"], inputs / name, i)
    models = [{"model": str(inputs / name)} for name in ("one", "two")]
    (inputs / "linear.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    flex = {"merge_method": "flexmerge", "models": models, "parameters": {"target_size": 2}}
    (inputs / "flexmerge.yml").write_text(yaml.safe_dump(flex))
    (tmp_path / "outputs").mkdir()
    return tmp_path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(place, out, method="linear", *options):
    arguments = [place / "inputs" / f"{method}.yml", out, *options]
    done = CliRunner().invoke(main, [*map(str, arguments), "-q"])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("Error: 1 problem with")
    return done.stderr


def test_what_is_in_the_way_is_reported_before_work(place):
    outputs = place / "outputs"
    (outputs / "file").touch()
    before = files(place)
    for out, said in [
        (outputs / "file", "which is a file"),
        (outputs / "file" / "out", "cannot be made"),
        (outputs / "file" / "deep" / "out", "cannot be made"),
        (outputs, "which is not empty"),
        (outputs / ("x" * 300), "File name too long"),
    ]:
        for options in ([], ["--check"]):
            assert said in refused(place, out, "linear", *options)
    assert files(place) == before
    adapter = load_adapter(place / "inputs" / "one")
    flexmerged = merge_adapters([adapter], "flexmerge", parameters={"target_size": 1})
    for out in (outputs, outputs / "file", outputs / "file" / "out"):
        for write_to in (flexmerged.save, lambda place: save_adapter(adapter, place)):
            with pytest.raises(ConfigError, match="1 problem with writing"):
                write_to(out)
    assert files(place) == before


@pytest.mark.parametrize("method", ["linear", "flexmerge"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT])
def test_an_error_while_writing_leaves_nothing(method, error, place, monkeypatch):
    def fail(path, *_, **__):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "write_text", fail)
    before = files(place)
    message = refused(place, place / "outputs" / "new" / "out", method)
    assert f"an error while writing ({os.strerror(error)}" in message
    assert files(place) == before


def test_a_place_that_cannot_be_made(place, monkeypatch):
    """As when somebody takes the right away after the check."""

    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("mergekit_ext.io.staging._locked", fail)
    before = files(place)
    for method in ("linear", "flexmerge"):
        assert "Permission denied" in refused(place, place / "outputs" / "new" / "out", method)
    assert files(place) == before


def test_a_file_that_grows_too_large(place):
    before = files(place)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        message = refused(place, place / "outputs" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "an error while writing" in message and "too large" in message
    assert files(place) == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(place, exists):
    outputs = place / "outputs"
    if exists:
        (outputs / "real").mkdir()
    (outputs / "link").symlink_to(outputs / "real")
    save_adapter(load_adapter(place / "inputs" / "one"), outputs / "link")
    assert (outputs / "link").is_symlink()
    assert load_adapter(outputs / "real").infos
