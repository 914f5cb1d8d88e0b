"""Fixtures of the host's tests."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergekit_ext
from mergekit_ext.errors import ConfigError
from tests.host import adapters, small
from tests.host.flexmerge_models import Family, made


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Families by architecture and dtype; do not change their files."""
    found: dict[tuple[str, torch.dtype], Family] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Family:
        if (name, dtype) not in found:
            found[name, dtype] = made(tmp_path_factory.mktemp(name), name, dtype)
        return found[name, dtype]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return get


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of small models, by name; do not change them."""
    return small.zoo(tmp_path_factory.mktemp("models"))


@pytest.fixture
def copy(models, tmp_path):
    """Make a model's folder with changed tensors and configuration."""

    def make(name, change=lambda tensors: None, **config):
        folder = tmp_path / f"{name}_changed"
        folder.mkdir()
        tensors = load_file(models / name / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        settings = json.loads((models / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **config}))
        return folder

    return make


@pytest.fixture(autouse=True)
def check_and_merge_agree(request, monkeypatch, tmp_path_factory):
    """Merge every text that a test checks: both give the same answer.

    A test whose inputs no merge can read has the mark ``only_checked``, with the reason.
    """
    if request.node.get_closest_marker("only_checked"):
        return

    def agreeing(check):
        def checked(text, options, **flags):
            reports = check(text, options, **flags)
            if len(reports) == 1 and not flags and ".safetensors" not in text:
                out = tmp_path_factory.mktemp("merged") / "out"
                assert refusal(f"{text}\n", options, out) == reports[0][1].problems
            return reports

        return checked

    for module in (request.module, adapters, small):
        if hasattr(module, "check_source"):
            monkeypatch.setattr(module, "check_source", agreeing(module.check_source))


def refusal(text, options, out):
    """The problems with which the merge refuses; none if there is an output."""
    quiet = options.model_copy(update={"quiet": True, "write_model_card": False})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mergekit_ext.merge(text, out, quiet)
    except ConfigError as error:
        assert not out.exists()
        return error.problems
    assert any(out.glob("*.json"))
    return ()
