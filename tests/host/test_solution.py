"""Solutions that are kept: merges that differ in how one is used find it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_tensors
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.errors import ConfigError
from mergekit_ext.events import MergeCallback
from mergekit_ext.host.session import Session, active
from mergekit_ext.io.solution import Solution
from tests import models as small

QUIET = MergeOptions(quiet=True, copy_tokenizer=False)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("family"), small.llama)[1]


def merge(tuned, out, kept, method="lore", callbacks=(), **parameters):
    given = {"mu_relative": 0.3, "lambda": 1.0, **parameters} if method == "lore" else parameters
    text = yaml.safe_dump(small.config(method, tuned, None, given))
    return mergekit_ext.merge(text, out, QUIET, keep_solution=kept, callbacks=callbacks)


@pytest.fixture(scope="module")
def kept(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "solution"
    merge(tuned, folder.parent / "out", folder)
    return folder


class Iterations(MergeCallback):
    def __init__(self):
        self.seen = []

    def on_solver_iteration(self, event):
        self.seen.append(event.iteration)


@pytest.mark.parametrize(
    "changed", [{"lambda": 0.5}, {"combine": "ties"}, {"weight": 0.4, "lambda": "auto"}], ids=str
)
def test_another_use_is_not_solved_again(changed, tuned, kept, tmp_path):
    iterations = Iterations()
    found = merge(tuned, None, kept, callbacks=[iterations], **changed)
    assert set(iterations.seen) == {1}
    first, without = merge(tuned, None, tmp_path, **changed), merge(tuned, None, None, **changed)
    for name, tensor in found.tensors.items():
        assert tensor.equal(first.tensors[name])
        close = tensor.isclose(without.tensors[name], rtol=1e-4, atol=1e-5)
        assert close.float().mean() > 0.999  # TIES may elect another sign where a sum is about zero
    solved = [result.report["tensors"] for result in (found, first)]
    assert solved[0] == solved[1]


def test_each_expert_keeps_its_threshold(tmp_path):
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(2, 12, 9, generator=generator) for _ in range(3)]
    for model in models:
        model[0] *= 10
    given = {"mu_relative": 0.3, "lambda": 1.0}
    wanted = merge_tensors(models, "lore", parameters=given)
    session = Session()
    session.solution = Solution(tmp_path, {})
    with active(session):
        found = merge_tensors(models, "lore", parameters=given)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)  # of entries up to 30


def test_what_does_not_fit_is_refused(tuned, kept, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for folder, models, given, found in (
        (kept, tuned, {"mu_relative": 0.2}, "solved for other parameters"),
        (kept, tuned[:2], {"update": "sequential"}, "solved for other models, parameters, input"),
        (tmp_path / "other", tuned, {}, "cannot be read as JSON"),
        (kept, tuned, {"method": "linear", "weight": 1.0}, "expected lore without a base"),
    ):
        before = json.loads((kept / "solution.json").read_text())
        with pytest.raises(ConfigError, match=r"--keep-solution: .*" + found):
            merge(models, tmp_path / "out", folder, **given)
        assert json.loads((kept / "solution.json").read_text()) == before
    assert not (tmp_path / "out").exists()
