"""Bases that name their tensors otherwise than their fine-tunes: bare models, older versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file
from transformers import AutoModel, BertModel, ViTModel

from mergekit_ext import flexmerge
from mergekit_ext.errors import MergeWarning
from mergekit_ext.host.checks.merge import check_merge
from tests import models as small
from tests.host.flexmerge_models import QUIET, Family, as_index_says, merge, rewrite, same, vit
from tests.host.small import checked, merging, tuned

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
            assert f'flexmerge.load(".", task="{task.name}")' in card.read_text()
            model = flexmerge.load(tmp_path / "ours", task=task.name)
            assert type(model).__name__.endswith("Classification")
    assert [f.sha256 for f in ours.files] == [f.sha256 for f in theirs.files]


def test_bare_models(tmp_path):
    whole = Family(*small.family(tmp_path, vit))
    bare = []
    for path in whole.tuned:
        bare.append(tmp_path / f"bare-{path.name}")
        AutoModel.from_pretrained(path, add_pooling_layer=False).save_pretrained(bare[-1])
    family = Family(whole.base, bare)
    with pytest.warns(MergeWarning, match="pooler"):
        merge(family.content(1), tmp_path / "out")
    merge(whole.content(1), tmp_path / "whole")
    body = as_index_says(tmp_path / "whole" / "tuned0")
    wanted = {n.removeprefix("vit."): t for n, t in body.items() if n.startswith("vit.")}
    assert same(as_index_says(tmp_path / "out" / "bare-tuned0"), wanted)


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def old_names(folder: Path) -> None:
    """Call the parameters of norms as the first BERTs on the Hub do."""

    def older(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return name.replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(folder, lambda state: {older(name): tensor for name, tensor in state.items()})


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_norms_of_an_old_base_are_merged(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL)
    base = getattr(transformers, kind)(config)
    base.save_pretrained(tmp_path / "base")
    old_names(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), 1):
        model = transformers.BertForSequenceClassification(config)
        body = base if kind == "BertModel" else base.bert
        model.bert.load_state_dict(body.state_dict(), strict=False)
        tuned(model, seed).save_pretrained(tmp_path / name)
    parameters = {"target_size": 1, "algorithm": "average"}
    paths = [tmp_path / name for name in ("base", "one", "two")]
    document = merging(*paths, method="flexmerge", parameters=parameters)
    assert not checked(document).problems
    out = tmp_path / "out"
    merge(document, out)
    one, two = (load_file(path / "model.safetensors") for path in paths[1:])
    loaded = transformers.BertForSequenceClassification.from_pretrained(out / "one").state_dict()
    norms = [name for name in one if "LayerNorm" in name]
    assert len(norms) == 6
    for name in norms:
        torch.testing.assert_close(loaded[name], (one[name] + two[name]) / 2)


def test_two_tasks_with_two_names_are_warned_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL)
    for name in ("base", "one", "two"):
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
    old_names(tmp_path / "two")
    paths = [tmp_path / name for name in ("base", "one", "two")]
    report = checked(merging(*paths, method="flexmerge", parameters={"target_size": 2}))
    (warning,) = report.warnings
    assert "6 tensors have two names" in warning and "LayerNorm" in warning
