from __future__ import annotations

import pytest

from mergekit_ext.host.blocks import block_of

NAMES = {
    # Llama, Mistral, Qwen
    "model.layers.3.self_attn.q_proj.weight": "model.layers.3.attention",
    "model.layers.3.self_attn.q_norm.weight": "model.layers.3.self_attn.q_norm",
    "model.layers.3.mlp.down_proj.weight": "model.layers.3.mlp",
    "model.layers.3.post_attention_layernorm.weight": "model.layers.3.post_attention_layernorm",
    "model.layers.3.block_sparse_moe.experts.2.w1.weight": "model.layers.3.mlp",
    "model.embed_tokens.weight": "model.embed_tokens",
    "model.norm.weight": "model.norm",
    "lm_head.weight": "lm_head",
    # BERT
    "bert.encoder.layer.1.attention.self.query.bias": "bert.encoder.layer.1.attention",
    "bert.encoder.layer.1.attention.output.dense.weight": "bert.encoder.layer.1.attention",
    "bert.encoder.layer.1.attention.output.LayerNorm.weight": (
        "bert.encoder.layer.1.attention.output.LayerNorm"
    ),
    "bert.encoder.layer.1.intermediate.dense.weight": "bert.encoder.layer.1.mlp",
    "bert.encoder.layer.1.output.dense.weight": "bert.encoder.layer.1.mlp",
    "bert.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings",
    "classifier.bias": "classifier",
    # GPT-2
    "transformer.h.0.attn.c_attn.weight": "transformer.h.0.attention",
    "transformer.h.0.mlp.c_fc.weight": "transformer.h.0.mlp",
    "transformer.h.0.ln_1.weight": "transformer.h.0.ln_1",
    # T5
    "decoder.block.1.layer.0.SelfAttention.q.weight": "decoder.block.1.attention",
    "decoder.block.1.layer.1.EncDecAttention.k.weight": "decoder.block.1.cross_attention",
    "decoder.block.1.layer.2.DenseReluDense.wi.weight": "decoder.block.1.mlp",
    "decoder.block.1.layer.2.layer_norm.weight": "decoder.block.1.layer.2.layer_norm",
    "shared.weight": "shared",
    # ViT, Whisper
    "vit.encoder.layer.0.attention.attention.key.weight": "vit.encoder.layer.0.attention",
    "vit.encoder.layer.0.layernorm_before.weight": "vit.encoder.layer.0.layernorm_before",
    "model.decoder.layers.0.encoder_attn.q_proj.weight": "model.decoder.layers.0.cross_attention",
    "model.decoder.layers.0.fc1.weight": "model.decoder.layers.0.mlp",
}


@pytest.mark.parametrize(("name", "block"), NAMES.items())
def test_block_of(name, block):
    assert block_of(name) == block
