"""Analyses on disk: found again when nothing changed, and only then."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mergekit_ext.flexmerge import analysis_file
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.analysis_file import FILE_NAME, find, save, subject_of
from mergekit_ext.flexmerge.source import BlockReader, FileSource, Source
from mergekit_ext.io.headers import read_folder
from tests.flexmerge.inputs import family, layout_of


class Case:
    """Three models on disk."""

    def __init__(self, folder):
        self.folder = folder
        base, models = family(3)
        self.names = ["base", "m0", "m1", "m2"]
        for name, state in zip(self.names, (base, *models), strict=True):
            self.write(name, state)
        self.states = dict(zip(self.names, (base, *models), strict=True))

    def write(self, name, state):
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        save_file(state, self.folder / name / "model.safetensors")

    def open(self, tasks=("a", "b", "c"), granularity="component"):
        sources = [FileSource(n, read_folder(self.folder / n)) for n in self.names]
        owners = [source.tensors for source in sources]
        layout = layout_of(tasks, owners, granularity=granularity)
        self.reader = BlockReader(layout, sources[0], sources[1:])
        return subject_of(self.reader), layout


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path / "models")


def saved(case, out, densities=(0.2, 1.0, 0.3)):
    subject, layout = case.open()
    analysis = analyse(case.reader, densities)
    out.mkdir(parents=True, exist_ok=True)
    save(out, analysis, subject, layout)
    return analysis


def test_it_comes_back_as_it_was(case, tmp_path):
    made = saved(case, tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path):
        found = find(folder, *case.open())
        assert found.cuts == made.cuts
        assert found.grams.keys() == made.grams.keys()
        for name, gram in made.grams.items():
            assert torch.equal(found.grams[name], gram)


def test_nowhere(case, tmp_path):
    saved(case, tmp_path / "far" / "away" / "out")
    assert find(tmp_path, *case.open()) is None
    assert find(tmp_path / "missing", *case.open()) is None


def test_a_changed_input_is_another_subject(case, tmp_path):
    saved(case, tmp_path / "out")
    before, _ = case.open()
    path = case.folder / "m1" / "model.safetensors"
    state = {n: t + 1 for n, t in case.states["m1"].items()}
    stamp = path.stat().st_mtime_ns
    case.write("m1", state)
    os.utime(path, ns=(stamp + 10**6, stamp + 10**6))
    assert path.stat().st_size > 0
    assert case.open()[0] != before
    assert find(tmp_path, *case.open()) is None


def test_a_changed_pickle_is_another_subject(tmp_path):
    _, (state,) = family(1)
    path = tmp_path / "pytorch_model.bin"
    digests = []
    for value in (state, {n: t + 1 for n, t in state.items()}):
        torch.save(value, path)
        os.utime(path, ns=(len(digests) * 10**9,) * 2)
        headers = read_folder(tmp_path, allow_pickle=True)
        source = Source("m", headers, value.__getitem__, [path])
        layout = layout_of(("a", "b"), [headers] * 3)
        digests.append(subject_of(BlockReader(layout, source, [source] * 2)))
    assert digests[0] != digests[1]


def test_blocks_and_tasks_are_part_of_it(case, tmp_path):
    saved(case, tmp_path / "out")
    assert find(tmp_path, *case.open(granularity="model")) is None
    assert find(tmp_path, *case.open(tasks=("a", "b", "d"))) is None
    case.names[1:] = case.names[:0:-1]
    assert find(tmp_path, *case.open()) is None


def test_the_newest_wins(case, tmp_path):
    for number, densities in enumerate([(0.1,) * 3, (0.2,) * 3, None]):
        saved(case, tmp_path / f"out{number}", densities)
        os.utime(tmp_path / f"out{number}" / FILE_NAME, ns=((5 - number) * 10**9,) * 2)
    assert list(find(tmp_path, *case.open()).cuts) == [(0.1,) * 3]


def spoil(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_gram(value):
    return lambda content: content["grams"].update(mlp=value)


SPOILED = {
    "no list": lambda c: c.update(grams=[1, 2]),
    "missing block": lambda c: c["grams"].pop("mlp"),
    "no number": set_gram("abc"),
    "ragged": set_gram([[1.0], [1.0, 2.0], [0.0]]),
    "an object": set_gram([[{}, 1, 1]] * 3),
    "another size": set_gram([[1.0, 0.0], [0.0, 1.0]]),
    "not symmetric": set_gram([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "negative norm": set_gram([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "not a number": set_gram([[float("nan")] * 3] * 3),
    "null": set_gram(None),
    "a number beyond float64": set_gram([[10**400] * 3] * 3),
    "another version": lambda c: c.update(version=2),
    "no subject": lambda c: c.pop("subject"),
    "no cuts": lambda c: c.pop("cuts"),
    "cuts are text": lambda c: c.update(cuts="none"),
    "cuts of two": lambda c: c["cuts"][0]["patterns"].pop(),
    "cuts of floats": lambda c: c["cuts"][0].update(patterns=[1.5, 2.0, float("inf")]),
    "cuts of text": lambda c: c["cuts"][0].update(patterns="abc"),
    "no densities": lambda c: c["cuts"][0].pop("densities"),
    "lists of lists": lambda c: c["cuts"][0].update(densities=[[1]]),
}


@pytest.mark.parametrize("kind", list(SPOILED))
def test_what_is_broken_is_passed_over(kind, case, tmp_path):
    saved(case, tmp_path / "out")
    spoil(tmp_path / "out" / FILE_NAME, SPOILED[kind])
    assert find(tmp_path, *case.open()) is None
    saved(case, tmp_path / "whole")
    assert find(tmp_path, *case.open()) is not None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 100_000, "\ud800", '{"subject": 1}']
)
def test_what_is_no_analysis_is_passed_over(text, case, tmp_path):
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8", errors="surrogatepass")
    assert find(tmp_path, *case.open()) is None


def test_odd_neighbours(case, tmp_path):
    saved(case, tmp_path / "out")
    (tmp_path / "a" / FILE_NAME).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FILE_NAME).symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / FILE_NAME)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FILE_NAME).write_bytes(b"\0" * 100)
    assert find(tmp_path, *case.open()) is not None


def test_too_large_to_be_one(case, tmp_path, monkeypatch):
    saved(case, tmp_path / "out")
    monkeypatch.setattr(analysis_file, "_LARGEST", 10)
    assert find(tmp_path, *case.open()) is None
