"""Names of files that lead out of a folder: in an index, a manifest, an output."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest

from mergekit_ext.flexmerge.analysis_file import FILE_NAME as ANALYSIS
from mergekit_ext.io.journal import Journal
from tests.attacks import texts
from tests.attacks.readers import (
    command,
    export,
    load_flexmerge,
    merge_flexmerge,
    merge_nan,
)
from tests.models import config

_OUT = [
    *("../elsewhere.safetensors", "/etc/passwd", "..", ".", "", "a/../../elsewhere.safetensors"),
    *("..\\elsewhere.safetensors", "C:\\weights.safetensors", "C:weights", "\\\\host\\share"),
    *("a\0b", "\ud800", "n" * 5_000, "~/weights.safetensors"),
]


def _short(path: str) -> str:
    return ascii(path)[:20]


_OTHERWISE = ("./model.safetensors", ".//model.safetensors", "model.safetensors/")


@pytest.mark.parametrize("shard", [*_OUT, *_OTHERWISE, 3, None, ["a"], {"a": 1}], ids=ascii)
def test_an_index(shard, inputs, refused):
    shutil.copy(inputs / "base" / "model.safetensors", inputs / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": shard}}
    (inputs / "tuned1" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no plain name" in refused(merge_nan, inputs) or shard not in _OTHERWISE


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, 3, "model.safetensors", {"no such tensor": "model.safetensors"}]
)
def test_the_map_of_an_index(weight_map, inputs, refused):
    index = {"weight_map": weight_map}
    (inputs / "tuned1" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(merge_flexmerge, inputs)


def test_a_name_twice_in_an_index(inputs, refused):
    text = '{"weight_map": {"lm_head.weight": "model.safetensors", "lm_head.weight": "x"}}'
    (inputs / "tuned1" / "model.safetensors.index.json").write_text(text)
    assert "twice" in refused(merge_nan, inputs)


@pytest.mark.parametrize("method", ["nan", "flexmerge"])
@pytest.mark.parametrize("place", ["model", "base", "adapter", "base of an adapter"])
@pytest.mark.parametrize("path", ["n" * 5_000, "a\0b", "~nobody/x", "loop", "\ud800"], ids=_short)
def test_a_model(path, place, method, inputs, refused, monkeypatch):
    monkeypatch.chdir(inputs)
    Path("loop").symlink_to("loop")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tuned = f"{inputs / 'tuned0'}"
    written = {
        "model": path,
        "base": tuned,
        "adapter": f"{inputs / 'base'}+{path}",
        "base of an adapter": f"{path}+{inputs / 'adapter0'}",
    }[place]
    base = path if place == "base" else inputs / "base"
    parameters = {"target_size": 1.0} if method == "flexmerge" else {}
    content = config(method, [Path(tuned)], None, parameters, base_model=str(base))
    content["models"].append({"model": written})

    def read(inputs, out):
        file = out.with_suffix(".yml")
        file.write_text(json.dumps(content))  # which is YAML, and holds half of a surrogate pair
        return command("mergekit-ext", "merge", file, out, "--quiet")

    refused(read, inputs)


@pytest.mark.parametrize("path", [*_OUT, "shards", "shards/", "shards/..", "shards/a/b"], ids=ascii)
def test_a_manifest(path, inputs, refused):
    file = inputs / "flex" / "flexmerge.json"
    content = json.loads(file.read_text())
    content["files"][0]["path"] = path
    file.write_text(json.dumps(content))
    refused(load_flexmerge, inputs)


@pytest.mark.parametrize("task", _OUT, ids=ascii)
def test_a_task_of_a_manifest(task, inputs, refused):
    file = inputs / "flex" / "flexmerge.json"
    text = file.read_text().replace('"tuned0"', json.dumps(task))
    file.write_text(text)
    refused(export, inputs)


@pytest.mark.parametrize("what", ["shard", "shards", "config"])
def test_links_out_of_a_checkpoint(what, inputs, refused):
    folder = inputs / "flex"
    place = {
        "shard": sorted((folder / "shards").iterdir())[0],
        "shards": folder / "shards",
        "config": folder / "tuned0" / "config.json",
    }[what]
    elsewhere = inputs.parent / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    assert "link" in refused(export, inputs)


@pytest.mark.parametrize(
    "out",
    ["n" * 300, "file/below", "loop/below", "/proc/nothing", "/dev/null"],
    ids=ascii,
)
@pytest.mark.parametrize("name", ["merge", "export", "peft-merge"])
def test_places_where_nothing_can_be_written(name, out, inputs, refused, monkeypatch):
    monkeypatch.chdir(inputs)
    (inputs / "file").touch()
    (inputs / "loop").symlink_to("loop")
    if name == "export":
        refused(lambda i, o: command("mergekit-ext", "export", i / "flex", "tuned0", out), inputs)
        return
    text = {
        "merge": "{merge_method: linear, models: [{model: base, parameters: {weight: 1}}]}",
        "peft-merge": "{merge_method: linear, models: [{model: adapter0}]}",
    }[name]
    file = inputs.parent / "m.yml"
    file.write_text(text.replace("linear", "nan") if name == "merge" else text)
    words = ("mergekit-ext", "merge") if name == "merge" else ("peft-merge",)
    refused(lambda i, o: command(*words, file, out, "--quiet"), inputs)


@pytest.mark.parametrize("text", texts.JSON)
def test_a_broken_analysis_is_not_used(text, inputs, answer):
    """The merge makes its own."""
    (inputs.parent / "work").mkdir()
    (inputs / "flex" / ANALYSIS).write_bytes(texts.JSON[text])
    assert answer(merge_flexmerge, inputs).code == 0


_LINES = [
    *(b"3", b"[1, 2]", b'["tensor", "a"]', b'["tensor", "a", 1, 2]', b'[["a"], "b", 1]'),
    *(b"[{}, {}, 1]", b"null", b'"abc"', b"[" * 100_000, b"\xff\xfe", b'{"a": 1, "b": 2, "c": 3}'),
    *(b"[NaN, Infinity, 1]", b"9" * 100_000),
]


@pytest.mark.parametrize("line", _LINES, ids=lambda line: ascii(line[:20]))
def test_a_broken_journal_counts_for_nothing(line, tmp_path):
    """Or rather its broken lines: what they would say is made again."""
    lines = [b'["tensor","a",1]', line, b'["tensor","b",1]']
    text = b"".join(b"%08x %s\n" % (zlib.crc32(content), content) for content in lines)
    (tmp_path / "journal-1-0.lines").write_bytes(text)
    journal = Journal(tmp_path)
    assert {("tensor", "a"), ("tensor", "b")} == set(journal.finished)
