"""Blocks, ties and order from names alone; test_block_architectures.py has those of real models."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import mergekit
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.host.blocks import (
    GRANULARITIES,
    block_of,
    blocks_of,
    depth_of,
    is_task_head,
    kind_of,
    layer_of,
    tied_groups,
)

NAMES = {
    # Llama, Mistral, Qwen
    "model.layers.3.self_attn.q_proj.weight": ("model.layers.3.attention", "attention"),
    "model.layers.3.self_attn.q_norm.weight": ("model.layers.3.self_attn.q_norm", "norm"),
    "model.layers.3.mlp.down_proj.weight": ("model.layers.3.mlp", "mlp"),
    "model.layers.3.post_attention_layernorm.weight": (
        "model.layers.3.post_attention_layernorm",
        "norm",
    ),
    "model.layers.3.block_sparse_moe.experts.2.w1.weight": ("model.layers.3.mlp", "mlp"),
    "model.layers.3.mlp.experts.gate_up_proj": ("model.layers.3.mlp", "mlp"),
    "model.layers.3.self_attn.gate_proj.weight": ("model.layers.3.attention", "attention"),
    "model.layers.3.self_attn.sinks": ("model.layers.3.attention", "attention"),
    "model.embed_tokens.weight": ("model.embed_tokens", "embedding"),
    "model.norm.weight": ("model.norm", "norm"),
    "lm_head.weight": ("lm_head", "head"),
    # BERT
    "bert.encoder.layer.1.attention.self.query.bias": (
        "bert.encoder.layer.1.attention",
        "attention",
    ),
    "bert.encoder.layer.1.attention.output.LayerNorm.weight": (
        "bert.encoder.layer.1.attention.output.LayerNorm",
        "norm",
    ),
    "bert.encoder.layer.1.output.dense.weight": ("bert.encoder.layer.1.mlp", "mlp"),
    "bert.embeddings.word_embeddings.weight": ("bert.embeddings.word_embeddings", "embedding"),
    "bert.embeddings.LayerNorm.weight": ("bert.embeddings.LayerNorm", "norm"),
    "cls.predictions.transform.LayerNorm.weight": ("cls.predictions.transform.LayerNorm", "head"),
    "bert.pooler.dense.bias": ("bert.pooler.dense", "other"),
    "classifier.bias": ("classifier", "head"),
    # GPT-2, XLNet, ALBERT, DINOv2
    "transformer.h.0.attn.c_attn.weight": ("transformer.h.0.attention", "attention"),
    "transformer.h.0.ln_1.weight": ("transformer.h.0.ln_1", "norm"),
    "transformer.layer.0.ff.layer_1.weight": ("transformer.layer.0.mlp", "mlp"),
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight": (
        "albert.encoder.albert_layer_groups.0.albert_layers.0.mlp",
        "mlp",
    ),
    "dinov2.encoder.layer.0.layer_scale1.lambda1": (
        "dinov2.encoder.layer.0.attention",
        "attention",
    ),
    "dinov2.encoder.layer.0.layer_scale2.lambda1": ("dinov2.encoder.layer.0.mlp", "mlp"),
    # T5, Whisper
    "decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (
        "decoder.block.1.attention",
        "attention",
    ),
    "decoder.block.1.layer.1.EncDecAttention.k.weight": (
        "decoder.block.1.cross_attention",
        "cross_attention",
    ),
    "decoder.block.1.layer.2.layer_norm.weight": ("decoder.block.1.layer.2.layer_norm", "norm"),
    "shared.weight": ("shared", "embedding"),
    "model.encoder.conv1.weight": ("model.encoder.conv1", "embedding"),
    # A head of pretraining that is called like a submodel (ModernBERT)
    "decoder.weight": ("decoder", "head"),
    # What no table knows
    "model.layers.3.mystery.weight": ("model.layers.3.mystery", "other"),
    "logit_scale": ("logit_scale", "other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_block_and_kind(name):
    assert (block_of(name), kind_of(name)) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "stack", "depth"),
    [
        ("model.layers.12.mlp.experts.7.w1.weight", "model.layers", 12),
        ("decoder.block.1.layer.2.DenseReluDense.wi.weight", "decoder.block", 1),
        ("swin.encoder.layers.2.blocks.5.layernorm_after.bias", "swin.encoder.layers.2.blocks", 5),
        ("layers.0.mlp.fc1.weight", "layers", 0),
        ("classifier.0.weight", None, None),
        ("visual.merger.mlp.2.weight", None, None),
        ("layers.0", None, None),
    ],
)
def test_stack_and_depth(name, stack, depth):
    assert depth_of(name) == depth
    layer = layer_of(name)
    if stack is None:
        assert layer is None
    else:
        assert layer == (stack, depth, name.removeprefix(f"{stack}.{depth}."))


def test_granularities():
    name = "model.layers.3.self_attn.q_proj.weight"
    blocks = {granularity: block_of(name, granularity) for granularity in GRANULARITIES}
    assert blocks == {
        "component": "model.layers.3.attention",
        "layer": "model.layers.3",
        "tensor": name,
        "model": "model",
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("classifier.weight", True),
        ("classifier.out_proj.bias", True),
        ("pre_classifier.weight", True),
        ("score.weight", True),
        ("qa_outputs.bias", True),
        ("classification_head.dense.weight", True),
        ("logits_proj.weight", True),
        ("multiple_choice_head.summary.weight", True),
        ("v_head.summary.weight", True),
        ("projector.weight", True),
        ("layer_weights", True),
        ("head.weight", True),
        ("lm_head.weight", False),
        ("lm_head.dense.weight", False),
        ("cls.predictions.decoder.weight", False),
        ("cls.seq_relationship.weight", False),
        ("embed_out.weight", False),
        ("proj_out.weight", False),
        ("head.dense.weight", False),
        ("pooler.dense.weight", False),
        ("bert.pooler.dense.weight", False),
        ("multi_modal_projector.linear_1.weight", False),
        ("vision_model.head.mlp.fc1.weight", False),
        ("model.layers.0.mlp.fc1.weight", False),
    ],
)
def test_task_heads(name, expected):
    assert is_task_head(name) is expected


def names_in_mergekits_layers():
    folder = Path(mergekit.__file__).parent / "_data" / "architectures"
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        modules = content.get("modules") or {"": {"architecture": content}}
        for module in modules.values():
            # mergekit 0.1.5 leaves out the dot after Whisper's "model.decoder".
            prefix = module.get("weight_prefix", "").rstrip(".")
            for weight in module["architecture"].get("layer_templates", {}).get("weights", []):
                yield f"{prefix}.{weight['name']}".lstrip(".").replace("${layer_index}", "3")


def test_no_layer_of_mergekits_architectures_is_unknown():
    names = set(names_in_mergekits_layers())
    assert len(names) > 200
    inside = {name for name in names if layer_of(name)}
    # What merges patches in Qwen's vision models is numbered, but is no layer.
    assert all("merger" in name for name in names - inside)
    unknown = {name for name in inside if kind_of(name) == "other"}
    assert {name for name in unknown if not block_of(name).endswith(".3.mixer")} == set()


def test_the_rule_needs_neither_torch_nor_mergekit():
    code = """
import sys, types
for name in ("torch", "mergekit", "transformers"):
    sys.modules[name] = None
host = types.ModuleType("mergekit_ext.host")
import mergekit_ext
host.__path__ = [mergekit_ext.__path__[0] + "/host"]
sys.modules["mergekit_ext.host"] = host
from mergekit_ext.host.blocks import block_of
print(block_of("model.layers.0.mlp.up_proj.weight"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "model.layers.0.mlp", done.stderr


def order_of(names):
    return list(blocks_of(names, "tensor", False))


T5_TIED = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
CASES = {
    "untied": (["model.embed_tokens.weight", "lm_head.weight"], False, []),
    "only one stored": (["model.embed_tokens.weight", "model.norm.weight"], True, []),
    "T5 1.1": ([*T5_TIED, "lm_head.weight"], False, [T5_TIED]),
    "T5 1.0": ([*T5_TIED, "lm_head.weight"], True, [{*T5_TIED, "lm_head.weight"}]),
    "T5 without shared": (
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
        True,
        [{"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}],
    ),
    "bias of an untied head": (
        ["cls.predictions.bias", "cls.predictions.decoder.bias", "cls.predictions.decoder.weight"],
        False,
        [{"cls.predictions.bias", "cls.predictions.decoder.bias"}],
    ),
    # Two BERTs as encoder and decoder have an embedding each.
    "two models": (
        [
            "encoder.embeddings.word_embeddings.weight",
            "decoder.bert.embeddings.word_embeddings.weight",
            "decoder.cls.predictions.decoder.weight",
        ],
        True,
        [
            {
                "decoder.bert.embeddings.word_embeddings.weight",
                "decoder.cls.predictions.decoder.weight",
            }
        ],
    ),
    "the decoder's": (
        ["bert.embeddings.word_embeddings.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
        True,
        [{"decoder.embed_tokens.weight", "lm_head.weight"}],
    ),
    "position embeddings are not tied": (
        ["transformer.wpe.weight", "lm_head.weight", "embeddings.position_embeddings.weight"],
        True,
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tied_groups(case):
    names, tie_word_embeddings, expected = CASES[case]
    assert tied_groups(names, tie_word_embeddings) == expected
    for granularity in GRANULARITIES:
        blocks = blocks_of(names, granularity, tie_word_embeddings)
        for group in expected:
            (home,) = [block for block, members in blocks.items() if group & set(members)]
            assert group <= set(blocks[home])


def test_order_counts():
    names = [f"model.layers.{depth}.mlp.up_proj.weight" for depth in (10, 2, 0, 100, 11)]
    assert [depth_of(name) for name in order_of(names)] == [0, 2, 10, 11, 100]


def test_a_stage_ends_with_what_follows_its_layers():
    stages = [f"swin.encoder.layers.{stage}" for stage in (0, 1)]
    names = [
        f"{stages[0]}.blocks.0.layernorm_before.weight",
        f"{stages[0]}.blocks.1.mlp.fc1.weight",
        f"{stages[0]}.downsample.reduction.weight",
        f"{stages[1]}.blocks.0.layernorm_before.weight",
    ]
    assert order_of(reversed(names)) == names


def test_names_that_count_alike_are_in_one_order():
    names = ["x.1", "x.01", "x1", "x.001"]
    assert order_of(names) == sorted(names)


def test_tied_names_stand_next_to_each_other():
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
    assert blocks_of(names, "tensor", True) == {
        "model.embed_tokens.weight": ["model.embed_tokens.weight", "lm_head.weight"],
        "model.layers.0.mlp.up_proj.weight": ["model.layers.0.mlp.up_proj.weight"],
    }
    assert blocks_of(names, "model", True) == {"model": [names[2], names[0], names[1]]}


ANY_NAMES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "model.norm.weight",
                "cls.predictions.bias",
                "score.weight",
                "lm_head.weight",
                *sorted(T5_TIED),
            ]
        ),
        st.lists(
            st.sampled_from(["layers", "0", "10", "blocks", "attn", "norm", "weight", "x", ""]),
            min_size=1,
            max_size=6,
        ).map(".".join),
    ),
    max_size=12,
)


@given(ANY_NAMES, st.sampled_from(sorted(GRANULARITIES)), st.booleans(), st.randoms())
def test_blocks_partition_the_names_in_any_order(names, granularity, tied, chance):
    blocks = blocks_of(names, granularity, tied)
    placed = [name for members in blocks.values() for name in members]
    assert sorted(placed) == sorted(set(names))
    shuffled = random.Random(chance.random()).sample(names, len(names))
    again = blocks_of(shuffled, granularity, tied)
    assert list(again.items()) == list(blocks.items())
    if not tied_groups(names, tied):
        assert all(block_of(name, granularity) == b for b, ms in blocks.items() for name in ms)


@given(ANY_NAMES)
def test_finer_granularities_split_coarser_ones(names):
    for name in names:
        for other in names:
            same = [block_of(name, g) == block_of(other, g) for g in GRANULARITIES]
            component, layer, tensor, model = same
            assert tensor <= component <= layer <= model
