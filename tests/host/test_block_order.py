"""Ties, network order, and blocks as a partition of a model's names."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ext.host.blocks import (
    GRANULARITIES,
    block_of,
    blocks_of,
    depth_of,
    tied_groups,
)


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
