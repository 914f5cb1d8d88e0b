"""Multi-merges: a name is no way out of the folder of the results, a broken file one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.attacks.readers import command

_NAMES = {
    "above": "../evil",
    "absolute": "/tmp/evil",
    "below": "a/b",
    "dot": ".",
    "dots": "..",
    "empty": "",
    "windows": "..\\evil",
    "drive": "C:evil",
    "trailing": "a/",
    "escape": "a\x1b[2J",
    "NUL": "a\0b",
    "number": 3,
    "list": ["a"],
    "mapping": {"a": 1},
}


def multi(file: Path, *documents: object) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n---\n".join(json.dumps(document) for document in documents))
    return file


def merge(file: Path, out: Path):
    folder = out.parent / "parts"
    return command("mergekit-multi", file, "-I", folder, "--out-path", out, "--quiet")


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("method", ["nan", "linear"])
def test_names(name, method, inputs, refused):
    one = {"model": str(inputs / "tuned0"), "parameters": {"weight": 1}}
    first = {"name": _NAMES[name], "merge_method": method, "models": [one]}
    last = {"merge_method": "nan", "models": [one]}
    file = multi(inputs.parent / "work" / "multi.yml", first, last)
    assert "name: found" in refused(lambda _, out: merge(file, out), inputs)
    assert "name: found" in refused(lambda _, out: command("mergekit-ext", "check", file), inputs)


@pytest.mark.parametrize("documents", [2, 3], ids=["itself", "a circle"])
def test_circles(documents, inputs, refused):
    parts = [
        {"name": f"n{i}", "merge_method": "nan", "models": [{"model": f"n{i // 2}"}]}
        for i in range(documents)
    ]
    file = multi(inputs.parent / "work" / "multi.yml", *parts)
    assert "depends on itself" in refused(lambda _, out: merge(file, out), inputs)


def test_one_name_twice(inputs, refused):
    one = {"merge_method": "nan", "models": [{"model": str(inputs / "tuned0")}]}
    file = multi(inputs.parent / "work" / "multi.yml", one, one)
    assert "second document" in refused(lambda _, out: merge(file, out), inputs)


_TEXTS = {
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "a list": b"- 1\n",
    "nothing": b"null\n---\nnull\n",
    "a loose end": b"merge_method: linear\nmodels: [{model: x}]\n---\n",
    "no YAML": b"a: &a [1]\nb: *c\n",
    "no inputs": b"name: a\nmerge_method: nan\n",
    "no method": b"models: [{model: x}]\n",
}


@pytest.mark.parametrize("text", _TEXTS)
def test_broken_files(text, tmp_path, refused):
    file = tmp_path / "multi.yml"
    file.write_bytes(_TEXTS[text])
    refused(lambda _, out: merge(file, out), tmp_path / "work")


def test_a_folder_in_the_place_of_the_file(tmp_path, refused):
    refused(lambda _, out: merge(tmp_path, out), tmp_path / "work")


def test_names_of_mergekit_s_own_merges_are_its_own_business(inputs):
    one = {"model": str(inputs / "tuned0"), "parameters": {"weight": 1}}
    file = multi(
        inputs.parent / "m.yml", {"name": "a/b", "merge_method": "linear", "models": [one]}
    )
    done = command("mergekit-multi", file, "-I", inputs.parent / "parts", "--quiet")
    assert done.code == 0
    assert (inputs.parent / "parts" / "a" / "b" / "config.json").is_file()
