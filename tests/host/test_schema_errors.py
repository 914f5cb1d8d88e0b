"""A file that mergekit's schema refuses is one message of every command, whatever its method."""

from __future__ import annotations

import pytest

from tests.attacks.readers import command
from tests.models import write_yaml

MODELS = [{"model": "a"}, {"model": "b"}]
SLICE = {"model": "a", "layer_range": [0, 2]}
# Each with the place that its message names.
DOCUMENTS = {
    "model for models": ({"model": MODELS}, "models"),
    "merge_methods": ({"models": MODELS, "merge_methods": "linear", "merge_method": None}, "_met"),
    "no method": ({"models": MODELS, "merge_method": None}, "merge_method"),
    "nothing else": ({}, "models"),
    "models and slices": ({"models": MODELS, "slices": [{"sources": [SLICE]}]}, "models"),
    "models a text": ({"models": "a"}, "models"),
    "models of texts": ({"models": ["a", "b"]}, "models[0]"),
    "a list for a model": ({"models": [{"model": ["a"]}]}, "models[0].model"),
    "two plus signs": ({"models": [{"model": "a+b+c"}]}, "a+b+c"),
    "slices without sources": ({"slices": [SLICE]}, "slices[0]"),
    "a slice of nothing": ({"slices": [{"sources": []}]}, "slices[0].sources"),
    "a slice of nothing in a module": (
        {"modules": {"default": {"slices": [{"sources": [SLICE]}, {"sources": []}]}}},
        "modules.default.slices[1].sources",
    ),
    "three ends of a range": (
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1, 2]}]}]},
        "slices[0].sources[0].layer_range",
    ),
    "an empty module": ({"modules": {"default": {}}}, "slices or models"),
    "parameters a list": ({"models": MODELS, "parameters": [1]}, "parameters"),
    "a parameter without a value": (
        {"models": MODELS, "parameters": {"weight": [{"filter": "mlp"}]}},
        "parameters.weight",
    ),
    "a number for dtype": ({"models": MODELS, "dtype": 16}, "dtype"),
    "two tokenizers": (
        {"models": MODELS, "tokenizer": {"source": "base"}, "tokenizer_source": "base"},
        "tokenizer",
    ),
    "a tokenizer of texts": ({"models": MODELS, "tokenizer": ["base"]}, "tokenizer"),
}
COMMANDS = {
    "mergekit-yaml": lambda file, out: (file, out),
    "mergekit-multi": lambda file, out: (file, "-I", out, "--out-path", out / "last"),
    "mergekit-ext merge": lambda file, out: (file, out),
    "mergekit-ext check": lambda file, out: (file,),
}


# Every document for one command, and two for each command, of whose parts one is mergekit's.
CASES = [("mergekit-ext check", kind, "nan") for kind in DOCUMENTS]
CASES += [
    (name, kind, method)
    for name in COMMANDS
    for kind in ("model for models", "a slice of nothing")
    for method in ("linear", "nan")
]


@pytest.mark.parametrize(("name", "kind", "method"), CASES)
def test_one_message(name, kind, method, tmp_path):
    content, place = DOCUMENTS[kind]
    content = {"merge_method": method, **content}
    content = {key: value for key, value in content.items() if value is not None}
    file, out = write_yaml(tmp_path / "merge.yml", content), tmp_path / "out"
    words = name.split()
    outcome = command(*words, *COMMANDS[name](file, out))
    assert outcome.code == 2
    assert place in outcome.text
    assert "pydantic" not in outcome.text
    assert not out.exists()


@pytest.mark.parametrize("name", ["mergekit-yaml", "mergekit-ext merge"])
def test_no_document(name, tmp_path):
    file, out = tmp_path / "merge.yml", tmp_path / "out"
    file.write_text("# nothing but a comment\n")
    assert "the file: found no document" in command(*name.split(), file, out).text
