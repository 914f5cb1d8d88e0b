"""Bare bases and fine-tunes with heads, and the other way round."""

from __future__ import annotations

import pytest
from mergekit.config import MergeConfiguration
from transformers import AutoModel, BertModel, ViTModel

from mergekit_ext import flexmerge
from mergekit_ext.errors import MergeWarning
from mergekit_ext.host.checks.merge import check_merge
from tests import models as small
from tests.host.flexmerge_models import QUIET, Family, as_index_says, merge, same, vit

BARE = {"vit": (vit, ViTModel), "bert": (small.bert, BertModel)}


def bare_base(family: Family, kind, folder) -> Family:
    kind.from_pretrained(family.base).save_pretrained(folder)
    return Family(folder, family.tuned)


@pytest.mark.parametrize("algorithm", ["task_arithmetic", "emr"])
@pytest.mark.parametrize("name", BARE)
def test_a_bare_base_is_the_same_base(name, algorithm, tmp_path):
    make, kind = BARE[name]
    whole = Family(*small.family(tmp_path, make))
    bare = bare_base(whole, kind, tmp_path / "bare")
    content = bare.content(2.5 if algorithm == "emr" else 1.2, algorithm)
    report, _ = check_merge(MergeConfiguration.model_validate(content), QUIET, content)
    assert not report.problems
    assert f"read as `{name}.<name>`" in " ".join(report.notes)
    ours = merge(content, tmp_path / "ours")
    theirs = merge({**content, "base_model": str(whole.base)}, tmp_path / "theirs")
    assert ours.blocks == theirs.blocks
    for task in ours.tasks:
        card = tmp_path / "ours" / task.name / "README.md"
        assert card.exists() != task.ordinary
        if not task.ordinary:
            assert f'flexmerge.load("..", task="{task.name}")' in card.read_text()
            model = flexmerge.load(tmp_path / "ours", task=task.name)
            assert type(model).__name__.endswith("Classification")
    assert [f.sha256 for f in ours.files] == [f.sha256 for f in theirs.files]


def test_bare_models(tmp_path):
    whole = Family(*small.family(tmp_path, vit))
    tuned = []
    for path in whole.tuned:
        tuned.append(tmp_path / f"bare-{path.name}")
        AutoModel.from_pretrained(path, add_pooling_layer=False).save_pretrained(tuned[-1])
    family = Family(whole.base, tuned)
    with pytest.warns(MergeWarning, match="pooler"):
        merge(family.content(1), tmp_path / "out")
    merge(whole.content(1), tmp_path / "whole")
    body = as_index_says(tmp_path / "whole" / "tuned0")
    wanted = {n.removeprefix("vit."): t for n, t in body.items() if n.startswith("vit.")}
    assert same(as_index_says(tmp_path / "out" / "bare-tuned0"), wanted)
