"""Low-rank residuals: what is written and read again, against full decompositions in float64."""

from __future__ import annotations

import pytest
import torch

from mergekit_ext.flexmerge.algorithm import Parameters
from mergekit_ext.flexmerge.decomposition import Decomposition
from mergekit_ext.flexmerge.files import described
from mergekit_ext.flexmerge.manifest import FILE_NAME
from mergekit_ext.flexmerge.merging import Merging, Walk
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.flexmerge.residual import (
    Limit,
    Residual,
    Residuals,
    ResidualStorage,
)
from mergekit_ext.flexmerge.storage import Target
from mergekit_ext.flexmerge.writer import write_checkpoint
from tests.flexmerge.inputs import algorithm, family, reader
from tests.reference import residual as naive

STACKED = {"grid.experts"}
VECTORS = {"attention.bias", "norm.weight", "gate.scale"}
DEFAULTS = {
    "vectors": "own",
    "embeddings": "low_rank",
    "max_rank": None,
    "rank": None,
    "energy": None,
    "rank_multiple": 1,
    "uniform_rank": False,
}


def residual(count, base="average", weights=None, **options):
    made = None if base is None else algorithm(base, count, weight=weights or [1.0] * count)
    models = [{"weight": weight} for weight in weights or [1.0] * count]
    return Residual(made, Parameters({**DEFAULTS, **options}, models, "block"))


class Case:
    """A decomposed family, and its planner."""

    def __init__(
        self, folder, count=3, forced=None, target=2.0, base="average", limit=None, **options
    ):
        self.base, self.models = family(count)
        self.reader = reader(self.base, self.models)
        self.storage = ResidualStorage(self.reader.layout, residual(count, base, **options), forced)
        self.target = Target.parse(target)
        folder.mkdir(exist_ok=True)
        self.found = Decomposition(self.reader, self.storage, folder.parent / "residuals")
        self.limit = limit or Limit(self.storage.budget(self.target))
        self.planner = Residuals(self.storage, self.found.spectra)
        self.merging = Merging(self.storage.algorithm, forced, self.found)
        self.folder = folder

    def write(self, plan=None):
        plan = plan or self.planner.plan(self.target)
        tasks = self.reader.layout.tasks
        origin = {"generator": "a test", "method": {}, "base_model": "base"}
        names = [f"model{i}" for i in range(len(tasks))]
        made = write_checkpoint(
            self.folder, self.reader, plan, self.merging, origin, names
        ).model_copy(update={"task_files": described(self.folder, tasks)})
        (self.folder / FILE_NAME).write_text(made.to_json())
        return open_checkpoint(self.folder, verify=True)

    def theta_0(self):
        return {n: torch.stack([m[n].double() for m in self.models]).mean(0) for n in self.base}


def check_tasks(case, tensors_of, ranks, tolerance=1e-6):
    theta_0 = case.theta_0()
    for task, model in enumerate(case.models):
        for name, tensor in tensors_of(task).items():
            expected = model[name].double()
            if name not in VECTORS:
                rank = ranks.get((task, name), 0)
                expected = naive.restored(model[name], theta_0[name], rank, name in STACKED)
            torch.testing.assert_close(tensor.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", [1.3, 1.7, 2.2])
def test_every_task_is_the_base_and_its_truncated_residuals(tmp_path, target):
    case = Case(tmp_path / "out", target=target)
    names = [name for name in case.base if name not in VECTORS]
    budget = case.storage.budget(case.target)
    ranks = naive.ranks(case.models, case.theta_0(), names, STACKED.__contains__, budget)
    assert ranks
    checkpoint = case.write()
    assert checkpoint.manifest.size.models <= target
    assert {g.kind for b in checkpoint.manifest.blocks for g in b.groups} == {"residual"}
    assert not any(task.ordinary for task in checkpoint.manifest.tasks)
    check_tasks(case, lambda task: checkpoint.tensors(f"task{task}"), ranks)
    walk = Walk(case.reader, case.merging)
    walk.go(case.planner.plan(case.target))
    for task in range(3):
        held, stored = walk.tensors(task), checkpoint.tensors(f"task{task}")
        assert all(torch.equal(held[name], stored[name]) for name in stored)


def test_full_ranks_bring_back_every_model(tmp_path):
    case = Case(tmp_path / "out", limit=Limit(rank=100))
    checkpoint = case.write(case.planner.within(case.limit))
    for task, model in enumerate(case.models):
        for name, tensor in checkpoint.tensors(f"task{task}").items():
            torch.testing.assert_close(tensor, model[name], rtol=1e-5, atol=1e-6)
