"""What of a model's class PEFT adapts exactly."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    MixtralConfig,
    MixtralForCausalLM,
)

import peft_merge
from peft_merge.layers import layers_of, units_of
from tests.matrix.classes import ROWS
from tests.matrix.family import Family

TOKENS = torch.arange(2, 14).view(2, 6)
SOUND = torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40)


def test_layers_of_real_classes():
    with torch.device("meta"):
        bert = layers_of(BertModel(BertConfig(hidden_size=24, num_attention_heads=2)))
        gpt = layers_of(GPT2Model(GPT2Config(n_embd=12, n_head=2, n_layer=1)))
        mixtral = layers_of(
            MixtralForCausalLM(
                MixtralConfig(
                    hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_local_experts=3
                )
            )
        )
    words, query = (
        bert["embeddings.word_embeddings.weight"],
        bert["encoder.layer.0.attention.self.query.weight"],
    )
    assert (words.info.layout, words.info.shape, words.bias) == ("embedding", (1, 24, 30522), False)
    assert (query.info.layout, query.transposed, query.bias) == ("linear", False, True)
    assert not any("LayerNorm" in name for name in bert)
    attention = gpt["h.0.attn.c_attn.weight"]
    assert (attention.info.shape, attention.transposed) == ((1, 36, 12), True)
    experts = mixtral["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.info.layout, experts.info.shape) == ("parameter", (3, 16, 32))


def test_what_has_another_forward_or_form_is_no_layer():
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    model = nn.ModuleDict(
        {
            "halved": Halved(3, 4),
            "grouped": nn.Conv1d(4, 4, 3, groups=2),
            "dilated": nn.Conv1d(4, 4, 3, dilation=2),
            "bounded": nn.Embedding(5, 3, max_norm=1.0),
            "attention": nn.MultiheadAttention(4, 2),
            "point": nn.Conv2d(3, 5, 2),
        }
    )
    found = layers_of(model)
    assert [*found] == ["point.weight"]
    weight = torch.arange(60.0).view(5, 3, 2, 2)
    assert torch.equal(found["point.weight"].matrices(weight), weight.view(1, 5, 12))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("MambaForCausalLM", {"input_ids": TOKENS}),
        ("WhisperForConditionalGeneration", {"input_features": SOUND, "decoder_input_ids": TOKENS}),
        ("DebertaV2ForSequenceClassification", {"input_ids": TOKENS}),
    ],
)
def test_what_a_class_uses_without_calling_it_is_no_layer(name, given, tmp_path):
    """What PEFT adds while it calls modules is what it adds to their weights."""
    family = Family(next(row for row in ROWS if row.name == name), tmp_path)
    peft_merge.extract(tmp_path / "base", tmp_path / "one", tmp_path / "lora", rank=2)
    base = type(family.base).from_pretrained(tmp_path / "base")
    if head := base.get_output_embeddings():  # to whose weight PEFT would add both changes
        head.weight = nn.Parameter(head.weight.detach().clone())
    model = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        found = model(**given).logits
        expected = model.merge_and_unload().eval()(**given).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_that_are_tied_to_no_head_have_no_unit():
    row = next(row for row in ROWS if row.name == "T5EncoderModel")
    assert not any("shared.weight" in unit.weights for unit in units_of(row.make()))
