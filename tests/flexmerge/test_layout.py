"""Which tensors models share, and where they lie in their blocks."""

from __future__ import annotations

import pytest
import torch

from mergekit_ext.host.naming import complete_ties, find_prefixes
from tests.flexmerge.inputs import family, headers, layout, layout_of


def test_blocks_come_in_order_and_their_tensors_follow_each_other():
    base, models = family(3)
    found = layout(base, models)
    blocks = {block.name: block for block in found.blocks}
    assert list(blocks) == ["embed", "norm", "attention", "gate", "grid", "mlp"]
    assert [(p.name, p.shape, p.slice) for p in blocks["attention"].parts] == [
        ("attention.bias", (6,), slice(0, 6)),
        ("attention.k", (4, 6), slice(6, 30)),
        ("attention.q", (6, 6), slice(30, 66)),
    ]
    assert blocks["attention"].size == 66
    assert (blocks["norm"].kind, blocks["mlp"].kind) == ("norm", "other")
    assert blocks["gate"].size == 1  # a scalar
    assert found.private == ((), (), ())
    assert found.private_bytes == 0


def test_what_is_not_alike_is_private_to_each_that_has_it():
    base, models = family(3)
    for index, model in enumerate(models):
        model["head.weight"] = torch.zeros(index + 2, 6)
        model["ids.position"] = torch.arange(4)
    base["head.weight"] = torch.zeros(2, 6)
    base["ids.position"] = torch.arange(4)
    models[1]["embed.weight"] = torch.zeros(12, 6)  # a resized vocabulary
    del models[2]["mlp.up"]
    models[0]["extra.weight"] = torch.ones(5)
    del base["norm.weight"]
    found = layout(base, models)
    names = [{header.name for header in headers} for headers in found.private]
    always = {"head.weight", "ids.position", "embed.weight", "norm.weight"}
    assert names == [
        always | {"mlp.up", "extra.weight"},
        always | {"mlp.up"},
        always,
    ]
    shared = {part.name for block in found.blocks for part in block.parts}
    assert shared.isdisjoint(set.union(*names))
    assert shared == set(base) - always - {"mlp.up"}
    assert found.private_bytes == sum(
        model[name].numel() * model[name].element_size()
        for model, private in zip(models, names, strict=True)
        for name in private
    )


def test_what_is_left_out_in_another_shape_is_private():
    base, models = family(2)
    models[1]["embed.weight"] = torch.zeros(12, 6)
    tensors = list(map(headers, (base, *models)))
    left = ["embed.weight", "norm.weight"]
    found = layout_of(("a", "b"), tensors, exclude=left, others="a")
    assert ([header.name for header in found.given], found.giver) == (["norm.weight"], 0)
    assert [[header.name for header in own] for own in found.private] == [["embed.weight"]] * 2


def test_a_tensor_that_is_an_integer_in_one_model_only_is_not_merged():
    base, models = family(2)
    models[1]["norm.weight"] = torch.ones(6, dtype=torch.int32)
    found = layout(base, models)
    assert "norm" not in [b.name for b in found.blocks]
    assert [len(headers) for headers in found.private] == [1, 1]


def test_bytes_count_the_dtype_that_holds_all_members():
    kinds = {-1: torch.float64, 0: torch.bfloat16, 1: torch.float16, 2: torch.float32}
    base, models = family(3, dtype=kinds.__getitem__)
    attention = layout(base, models).blocks[2]
    assert attention.bytes((0,)) == attention.bytes((1,)) == 2 * 66
    assert attention.bytes((0, 1)) == 4 * 66  # neither half holds the other
    assert attention.bytes((0, 2)) == attention.bytes((0, 1, 2)) == 4 * 66
    assert attention.bytes((0, 1), torch.bfloat16) == 2 * 66
    assert attention.base_bytes == 8 * 66
    assert attention.dtype((0,)) == torch.bfloat16
    assert attention.dtype((0, 1)) == torch.float32


def test_tensors_without_elements_take_part_and_take_nothing():
    base, models = family(2)
    for state in (base, *models):
        state["mlp.none"] = torch.zeros(0, 7)
    mlp = layout(base, models).blocks[-1]
    assert [p.slice.stop - p.slice.start for p in mlp.parts] == [54, 0, 54]
    assert mlp.bytes((0, 1)) == 4 * (54 + 54)


TIED = {"embed_tokens.weight": (11, 6), "norm.weight": (6,)}


def completed(base, models):
    return complete_ties([headers(base), *map(headers, models)], tied=True)


def test_a_tied_tensor_has_its_names_in_every_model():
    base, models = family(3, shapes=TIED)
    models[1]["lm_head.weight"] = models[1]["embed_tokens.weight"]
    for owner, state in zip(completed(base, models), (base, *models), strict=True):
        assert owner.keys() == {*base, "lm_head.weight"}
        stored = "lm_head.weight" if state is models[1] else "embed_tokens.weight"
        assert owner["lm_head.weight"].name == stored


def test_a_tied_tensor_that_cannot_be_shared_is_left_as_it_is():
    base, models = family(3, shapes=TIED)
    models[1]["lm_head.weight"] = models[1]["embed_tokens.weight"] = torch.zeros(12, 6)
    for owner, state in zip(completed(base, models), (base, *models), strict=True):
        assert owner.keys() == state.keys()


def test_a_name_that_only_the_base_has_is_not_given_to_the_models():
    base, models = family(2, shapes=TIED)
    base["lm_head.weight"] = base["embed_tokens.weight"]
    assert [set(owner) for owner in completed(base, models)[1:]] == [set(models[0])] * 2


# A base whose names have no prefix, or models whose have none

BODY = [f"encoder.layer.{i}.{part}.weight" for i in range(3) for part in ("up", "down")]


def prefixed(prefix, names):
    return [f"{prefix}.{name}" for name in names]


def test_a_bare_base():
    models = [[*prefixed("vit", BODY), "classifier.weight"], prefixed("vit", BODY)]
    assert find_prefixes([*BODY, "pooler.dense.weight"], models) == ("", "vit.")


def test_bare_models():
    base = [*prefixed("bert", BODY), "cls.predictions.bias"]
    assert find_prefixes(base, [BODY, [*BODY, "pooler.weight"]]) == ("bert.", "")


@pytest.mark.parametrize(
    ("base", "models"),
    [
        (BODY, [BODY, BODY]),
        (prefixed("vit", BODY), [prefixed("vit", BODY)] * 2),
        # One model of each kind: no prefix fits both.
        (BODY, [prefixed("vit", BODY), BODY]),
        (BODY, [prefixed("vit", BODY), prefixed("deit", BODY)]),
        # Which of the two would the base be?
        (BODY, [[*prefixed("text", BODY), *prefixed("vision", BODY)]] * 2),
        # Too few.
        (BODY, [prefixed("vit", BODY[:3])] * 2),
        (["weight"], [["a.weight", "b.weight"]] * 2),
        ([], [[]]),
        (BODY, []),
    ],
)
def test_no_prefix(base, models):
    assert find_prefixes(base, models) is None
