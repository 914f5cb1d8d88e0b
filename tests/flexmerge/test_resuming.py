"""Checkpoints and analyses that were stopped in the middle, or made by several processes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergekit_ext.errors import NonFiniteError, RankError
from mergekit_ext.flexmerge.algorithm import Declared
from mergekit_ext.flexmerge.analysis import analyse, trimmed_grams
from mergekit_ext.flexmerge.merging import Merging
from mergekit_ext.flexmerge.plan import Dendrograms
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.flexmerge.writer import write_checkpoint
from mergekit_ext.io.journal import Finished, Journal
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.parallel import Ranks, current
from tests.flexmerge.inputs import algorithm, family, reader
from tests.processes.together import together

CASES = ("average", "ties", "emr", "consensus", "dare", "forced")
BLOCKS = 6  # of `family`


class StopError(Exception):
    pass


class After:
    """A callback that stops the work at its n-th call."""

    def __init__(self, calls=None):
        self.left = calls

    def __call__(self, *_):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise StopError


class Counted:
    """A reader that knows which blocks it was asked for."""

    def __init__(self, inner):
        self.inner, self.blocks = inner, []

    def read(self, block, *members):
        self.blocks.append(block.name)
        return self.inner.read(block, *members)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Merge:
    """One case from analysis to checkpoint, in a folder that outlives it."""

    def __init__(self, case, folder, target=2.2, subject="inputs"):
        base, models = family(4)
        for number, model in enumerate(models[:2]):
            model["head.weight"] = torch.full((2, 3 + number), float(number))
        self.inputs = Counted(reader(base, models))
        name = {"dare": "average", "forced": "average"}.get(case, case)
        self.algorithm = algorithm(name, 4, {"density": 0.4}, "model")
        if case == "dare":
            given = self.algorithm.parameters
            shared = {**given.shared, "dare_density": 0.5}
            self.algorithm = Declared(self.algorithm.method, replace(given, shared=shared, seed=3))
        self.forced = torch.bfloat16 if case == "forced" else None
        self.folder, self.target, self.subject = folder, target, subject
        self.folder.mkdir(exist_ok=True)

    def run(self, measured=None, merged=None):
        ranks = current()
        journal = Journal(self.folder, ranks.rank)
        ranks.wait()
        finished = Finished(journal, self.subject)
        measured, merged = measured or After(), merged or After()
        densities = self.algorithm.densities
        try:
            found = analyse(self.inputs, densities, measured, finished)
            if densities is not None:
                self.algorithm.cuts = found.cuts[tuple(densities)]
            storage = Storage(self.inputs.layout, self.algorithm.masks, self.forced)
            similarities = [cosines(gram) for gram in found.grams.values()]
            plan = Dendrograms(storage, similarities).plan(Target(models=self.target))
            origin = {"generator": "a test", "method": {}, "base_model": "base"}
            out = self.folder / "out"
            out.mkdir(exist_ok=True)
            write_checkpoint(
                out,
                self.inputs,
                plan,
                Merging(self.algorithm, self.forced),
                origin,
                [f"m{i}" for i in range(4)],
                shard_size=400,
                merged=merged,
                finished=finished,
            )
        finally:
            journal.close()
        return files(self.folder / "out")


def files(folder: Path):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    made = {}

    def get(case, target=2.2):
        if (case, target) not in made:
            made[case, target] = Merge(case, tmp_path_factory.mktemp("whole"), target).run()
        return made[case, target]

    return get


@pytest.mark.parametrize("case", CASES)
def test_stopped_anywhere_and_gone_on_with(case, undisturbed, tmp_path):
    for stop in range(0, BLOCKS, 2):
        folder = tmp_path / str(stop)
        with pytest.raises(StopError):
            Merge(case, folder).run(measured=After(stop))
        with pytest.raises(StopError):
            Merge(case, folder).run(merged=After(stop))
        again = Merge(case, folder)
        assert again.run() == undisturbed(case)
        # Every block that was finished is not read again, those of the analysis included.
        assert len(again.inputs.blocks) <= BLOCKS - stop
    # What is finished altogether is not, either: all that is left is put together.
    whole = Merge(case, folder)
    assert whole.run() == undisturbed(case)
    assert not whole.inputs.blocks


@pytest.mark.parametrize(("case", "size"), [*((case, 2) for case in CASES), ("ties", 9)])
def test_processes_write_the_same_bytes(case, size, undisturbed, tmp_path):
    merges = [Merge(case, tmp_path) for _ in range(size)]
    found = together(lambda ranks: merges[ranks.rank].run(), size)
    assert found == [undisturbed(case)] * size
    read = [name for merge in merges for name in merge.inputs.blocks]
    wanted = Merge(case, tmp_path / "alone")
    wanted.run()
    assert sorted(read) == sorted(wanted.inputs.blocks)
    assert size > BLOCKS or all(merge.inputs.blocks for merge in merges)


def test_processes_go_on_with_what_another_number_of_them_has_left(undisturbed, tmp_path):
    def stopped(_):
        Merge("ties", tmp_path).run(merged=After(1))

    assert sum(isinstance(found, StopError) for found in together(stopped, 3)) >= 1
    merges = [Merge("ties", tmp_path) for _ in range(2)]
    found = together(lambda ranks: merges[ranks.rank].run(), 2)
    assert found == [undisturbed("ties")] * 2
    assert sum(len(merge.inputs.blocks) for merge in merges) < BLOCKS


@pytest.mark.parametrize("place", [-1, 0])
def test_a_spoiled_tensor_is_made_again(place, undisturbed, tmp_path):
    Merge("average", tmp_path).run()
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    path = shards[place]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = Merge("average", tmp_path)
    assert again.run() == undisturbed("average")
    assert len(again.inputs.blocks) <= 1


def test_a_lost_file_and_a_torn_line_cost_what_they_held(undisturbed, tmp_path):
    Merge("emr", tmp_path).run()
    (tmp_path / "out" / "shards" / "masks-00001.safetensors").unlink()
    (journal,) = tmp_path.glob("journal-*")
    journal.write_bytes(journal.read_bytes()[:-3])
    assert Merge("emr", tmp_path).run() == undisturbed("emr")


def test_another_size_takes_the_analysis_and_makes_what_differs(undisturbed, tmp_path):
    Merge("ties", tmp_path).run()
    other = Merge("ties", tmp_path, target=1.4)
    assert other.run() == undisturbed("ties", 1.4)
    assert 0 < len(other.inputs.blocks) <= BLOCKS
    changed = Merge("ties", tmp_path, target=1.4, subject="other inputs")
    changed.run()
    assert len(changed.inputs.blocks) > BLOCKS


def test_what_a_later_run_has_made_counts_before_what_earlier_ranks_noted(undisturbed, tmp_path):
    pair = [Merge("ties", tmp_path) for _ in range(2)]
    together(lambda ranks: pair[ranks.rank].run())
    Merge("ties", tmp_path, target=1.4).run()
    again = Merge("ties", tmp_path, target=1.4)
    assert again.run() == undisturbed("ties", 1.4)
    assert not again.inputs.blocks


@pytest.mark.parametrize("double", [False, True])
def test_a_stopped_analysis_keeps_products_and_then_all_cuts(double, tmp_path):
    densities = [0.3, 1.0, 0.5]
    base, models = family(3, dtype=lambda _: torch.float64 if double else torch.float32)
    wanted = analyse(reader(base, models), densities)
    passes = 4 if double else 2
    for stop in range(1, passes * BLOCKS, 4):
        journal = Journal(tmp_path)
        inputs = Counted(reader(base, models))
        with pytest.raises(StopError):
            analyse(inputs, densities, After(stop), Finished(journal, "x"))
        journal.close()
    for reads in (passes * BLOCKS, 0):
        journal, inputs = Journal(tmp_path), Counted(reader(base, models))
        found = analyse(inputs, densities, finished=Finished(journal, "x"))
        journal.close()
        assert found.cuts == wanted.cuts
        assert all(torch.equal(found.grams[name], gram) for name, gram in wanted.grams.items())
        assert len(inputs.blocks) == reads


def test_other_densities_are_counted_for_themselves(tmp_path):
    base, models = family(3)
    for densities in ([0.3] * 3, [0.5] * 3, [1.0, 0.5, 0.5]):
        journal = Journal(tmp_path)
        found = analyse(reader(base, models), densities, finished=Finished(journal, "x"))
        journal.close()
        assert found.cuts == analyse(reader(base, models), densities).cuts


def test_trimmed_products_are_noted_and_shared_out(tmp_path):
    merge = Merge("ties", tmp_path)
    densities = merge.algorithm.densities
    cuts = analyse(merge.inputs, densities).cuts[tuple(densities)]
    merge.algorithm.cuts = cuts
    wanted = trimmed_grams(merge.inputs, merge.algorithm)

    def measured(ranks):
        own, finished = Merge("ties", tmp_path), Finished(Journal(tmp_path, ranks.rank), "x")
        own.algorithm.cuts = cuts
        return trimmed_grams(own.inputs, own.algorithm, finished=finished)

    for found in (*together(measured, 2), measured(Ranks())):
        assert list(found) == list(wanted)
        assert all(torch.equal(found[name], gram) for name, gram in wanted.items())
    lines = [
        json.loads(x[9:]) for p in tmp_path.glob("journal-*") for x in p.read_text().splitlines()
    ]
    assert sorted(key for _, key, _ in lines) == sorted(wanted)


def test_an_error_in_one_process_ends_all(tmp_path):
    base, models = family(3)
    models[1]["norm.weight"][2] = torch.nan

    def measured(_):
        return analyse(reader(base, models))

    found = sorted(together(measured, 2), key=lambda error: isinstance(error, RankError))
    assert isinstance(found[0], NonFiniteError) and "norm.weight" in str(found[0])
    assert isinstance(found[1], RankError)
