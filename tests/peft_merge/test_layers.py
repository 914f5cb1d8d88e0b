"""What of a model's class PEFT adapts exactly."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    MixtralConfig,
    MixtralForCausalLM,
)

from peft_merge.layers import layers_of


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
