"""A base that was saved under older names is read by the names of its fine-tunes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_ext
from tests.host.small import checked, merging, tuned

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
    state = load_file(folder / "model.safetensors")
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in ends.items():
        state = {
            name.removesuffix(new) + old if name.endswith(new) else name: tensor
            for name, tensor in state.items()
        }
    save_file(state, folder / "model.safetensors", {"format": "pt"})


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
    parsed = MergeConfiguration.model_validate(document)
    mergekit_ext.merge(parsed, out, MergeOptions(quiet=True))
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
