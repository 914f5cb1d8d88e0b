"""Broken tokenizer files beside sound weights."""

from __future__ import annotations

import os

import pytest

from tests.attacks.readers import command
from tests.models import config, write_yaml

_CONTENT = {"cut": b"[", "a list": b"[]", "not UTF-8": b"\xff{" * 100, "nested": b"[" * 200_000}


def merge(inputs, out, **more):
    models = [inputs / "tuned0", inputs / "tuned1"]
    text = config("nan_ties", models, inputs / "base", {"density": 0.5}, **more)
    return command(
        "mergekit-ext", "merge", write_yaml(out.with_suffix(".yml"), text), out, "--quiet"
    )


@pytest.mark.parametrize("content", _CONTENT)
@pytest.mark.parametrize("more", [{}, {"tokenizer_source": "union"}], ids=["copied", "union"])
def test_content(content, more, inputs, refused):
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (inputs / "base" / name).write_bytes(_CONTENT[content])
    text = refused(lambda i, out: merge(i, out, **more), inputs)
    assert "tokenizer.json" in text and "tokenizer_config.json" in text


def test_one_of_a_union(inputs, refused):
    for name in ("base", "tuned0", "tuned1"):
        (inputs / name / "tokenizer.json").write_bytes(b"[" if name == "tuned1" else b"{}")
    text = refused(lambda i, out: merge(i, out, tokenizer_source="union"), inputs)
    assert "models[1].model" in text and "models[0].model" not in text


@pytest.mark.parametrize("kind", ["huge", "a folder", "endless", "a pipe"])
def test_no_file(kind, inputs, refused):
    file = inputs / "base" / "tokenizer_config.json"
    if kind == "a folder":
        file.mkdir()
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(file)
    else:
        with file.open("wb") as stream:
            stream.truncate(20 << 30)
    assert "tokenizer_config.json" in refused(merge, inputs)


def test_those_that_nobody_reads(inputs, answer):
    (inputs / "tuned1" / "tokenizer.json").write_bytes(b"[")
    assert answer(merge, inputs).code == 0
