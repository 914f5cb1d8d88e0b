"""Bodies without a head, as embedding models are saved, under mergekit's own command."""

from __future__ import annotations

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import save_file

from mergekit_ext.host.checks.merge import check_merge
from tests import models as small
from tests.reference import nan as reference

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
BODIES = ["BertModel", "MPNetModel", "XLMRobertaModel", "NomicBertModel"]


def bodies(name, folder):
    cls = getattr(transformers, name)
    return small.family(folder, lambda: cls(cls.config_class(**WIDTHS)))


def merge(config, out):
    """What mergekit's command does with its file; the checks find nothing."""
    parsed = MergeConfiguration.model_validate(config)
    assert not check_merge(parsed, MergeOptions())[0].problems
    run_merge(parsed, str(out), MergeOptions(quiet=True, write_model_card=False))


def loaded(folder):
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return model.state_dict()


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=3e-6, atol=3e-6, msg=name)


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_merged(name, tmp_path):
    base, tuned = bodies(name, tmp_path)
    merge(small.config("nan", tuned, base), tmp_path / "out")
    agree(loaded(tmp_path / "out"), reference.merge([loaded(t) for t in tuned], loaded(base)))


def test_mergekit_merges_a_body(tmp_path):
    _, tuned = bodies("BertModel", tmp_path)
    merge(small.config("linear", tuned, None, {"weight": 1.0}), tmp_path / "out")
    states = [loaded(t) for t in tuned]
    mean = {name: sum(s[name].double() for s in states) / len(states) for name in states[0]}
    agree(loaded(tmp_path / "out"), mean)


def test_an_optional_tensor_under_its_alias_is_merged(tmp_path):
    """Checkpoints of older versions hold ``position_ids``, and every name with a prefix."""
    positions = torch.arange(16)[None]
    base, tuned = bodies("BertModel", tmp_path)
    states = {model: small.state(model) for model in (base, *tuned)}
    for model, tensors in states.items():
        old = {f"bert.{name}": tensor for name, tensor in tensors.items()}
        old["bert.embeddings.position_ids"] = positions
        save_file(old, model / "model.safetensors", {"format": "pt"})
    merge(small.config("nan", tuned, base), tmp_path / "out")
    found = small.state(tmp_path / "out")
    assert found.pop("embeddings.position_ids").equal(positions)
    agree(found, reference.merge([states[t] for t in tuned], states[base]))
