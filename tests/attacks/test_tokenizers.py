"""Broken tokenizer files beside sound weights."""

from __future__ import annotations

import json
import os

import pytest

from tests.attacks.readers import command
from tests.models import config, tokenizer, write_yaml

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


# JSON, and no tokenizer: without any field, without one that is read, or with one of another type.
_LACKING = {
    "empty": lambda content: content.clear(),
    "no model": lambda content: content.pop("model"),
    "no added tokens": lambda content: content.pop("added_tokens"),
    "no vocabulary": lambda content: content["model"].pop("vocab"),
    "a list of texts": lambda content: content["model"].update(vocab=["w0"]),
    "a number": lambda content: content.update(added_tokens=1),
    "an unknown type": lambda content: content["model"].update(type="Own"),
}


@pytest.mark.parametrize("what", _LACKING)
@pytest.mark.parametrize("name", ["base", "tuned1"])
def test_json_that_is_no_tokenizer(what, name, inputs, refused):
    """Refused wherever it is loaded: mergekit takes the base's tokenizer in place of another."""
    for folder in ("base", "tuned0", "tuned1"):
        tokenizer(inputs / folder)
    file = inputs / name / "tokenizer.json"
    content = json.loads(file.read_text())
    _LACKING[what](content)
    file.write_text(json.dumps(content))
    text = refused(lambda i, out: merge(i, out, tokenizer_source="union"), inputs)
    assert {"base": "base_model", "tuned1": "models[1].model"}[name] in text
    assert "cannot be loaded" in text and "models[0].model" not in text


def test_json_that_is_copied_only(inputs, answer):
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (inputs / "base" / name).write_bytes(b"{}")
    assert answer(merge, inputs).code == 0


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
