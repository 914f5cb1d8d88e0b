"""Merging (IA)^3 vectors, against the definition and against activations of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import ModulesToSaveWrapper

from mergekit_ext.declared import Call, Merged, Method
from mergekit_ext.errors import ConfigError
from peft_merge.adapter import Ia3Adapter, VectorInfo
from peft_merge.coefficients import change_norms
from peft_merge.merge import merge_adapters
from peft_merge.modules import rules
from tests.peft_merge import loras, models
from tests.reference.ia3 import combine, multiplied, vectors_of


def weighted(tensors, call):
    total = sum(w * t for w, t in zip(call.weights, tensors, strict=True))
    return Merged(total, {"seen": call.short_side})


SUM = Method("sum", "", "", weighted, weighs=True)


def call(*weights):
    return Call(weights, {}, [{}] * len(weights))


def adapter(name, vectors, feedforward=frozenset()):
    infos = {
        key: VectorInfo(tuple(value.shape), key in feedforward, value.dtype)
        for key, value in vectors.items()
    }
    return Ia3Adapter(name, {"peft_type": "IA3"}, infos, vectors.__getitem__)


def column(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)[:, None]


def merge(adapters, weights, space="additive", **options):
    return loras.merge(adapters, SUM, lambda module: call(*weights), space=space, **options)


KINDS = [name for name, kind in models.KINDS.items() if not kind.lora]


@pytest.mark.parametrize("space", ["additive", "log"])
@pytest.mark.parametrize("name", KINDS)
def test_merged_vectors_act_on_activations_as_the_maths_say(name, space):
    kind = models.KINDS[name]
    ours, feedforward = vectors_of(models.adapted(kind, 1), "default")
    theirs, _ = vectors_of(models.adapted(kind, 2), "default")
    ours = {key: value.abs() + 0.1 for key, value in ours.items()}
    theirs = {key: value.abs() + 0.1 for key, value in theirs.items()}
    only = next(iter(theirs))
    del theirs[only]
    weights = [0.7, 1.9]
    merged, infos, report = merge(
        [adapter("ours", ours, feedforward), adapter("theirs", theirs, feedforward)],
        weights,
        space=space,
    )
    by_hand = combine(
        [{k: v.flatten().double().tolist() for k, v in side.items()} for side in (ours, theirs)],
        weights,
        space,
    )
    model = models.base(kind)
    with multiplied(model, {k: torch.tensor(v) for k, v in by_hand.items()}, feedforward):
        expected = models.answer(kind, model)
    plain = models.answer(kind, model)

    live = models.adapted(kind, 3)
    for module in live.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
    with torch.no_grad():
        for key, vector in merged.items():
            live.base_model.model.get_submodule(key).ia3_l["default"].copy_(vector)
    assert {key: value.shape for key, value in merged.items()} == {
        key: value.shape for key, value in ours.items()
    }
    assert {key for key, info in infos.items() if info.feedforward} == feedforward
    assert report[only]["adapters"] == 1
    torch.testing.assert_close(models.answer(kind, live), expected, rtol=2e-4, atol=2e-4)
    assert (expected - plain).abs().max() > 1e-2


OFF = {"mu": 0.0, "density": 1.0, "epsilon": 0.0, "gamma": 0.0, "clip": 0.0}


def unshrunk(rule, count):
    """Defaults, with every threshold off."""
    given = loras.defaults(rule, count)
    options = {key: OFF.get(key, value) for key, value in given.options.items()}
    each = [{key: OFF.get(key, value) for key, value in own.items()} for own in given.each]
    return Call([1.0] * count, options, each)


@pytest.mark.parametrize("space", ["additive", "log"])
@pytest.mark.parametrize("name", sorted(rules()))
def test_every_rule_gives_an_adapter_alone_back(name, space):
    rule = rules()[name]
    vectors = {
        "m": column(0.3, 1.0, 2.5, 1e-3, 1.2),
        "n": column(0.7),
        "still": column(1.0, 1.0),
        "c": torch.linspace(0.5, 2, 4).reshape(1, 4, 1, 1),
    }
    merged, _, _ = loras.merge(
        [adapter("a", vectors)], rule, lambda module: unshrunk(rule, 1), space=space
    )
    for module, vector in vectors.items():
        torch.testing.assert_close(merged[module], vector, rtol=1e-5, atol=1e-7)


def test_norms_are_of_what_rules_see():
    adapters = [adapter("a", {"m": column(4.0, 5.0)}), adapter("b", {"n": column(1.0)})]
    assert change_norms(adapters, "m", space="additive") == [5.0, 0.0]
    assert change_norms(adapters, "n", space="additive") == [0.0, 0.0]
    logs = change_norms([adapter("a", {"m": column(torch.e, torch.e)})], "m", space="log")
    assert logs == [pytest.approx(2**0.5)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-2, 2), st.lists(st.floats(0.01, 50), min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["additive", "log"]),
    st.data(),
)
def test_equals_the_definition_in_any_order(parts, space, data):
    order = data.draw(st.permutations(range(len(parts))))
    adapters = [
        adapter(f"a{i}", {"m": column(*values, dtype=torch.float64)})
        for i, (_, values) in enumerate(parts)
    ]
    weights = [weight for weight, _ in parts]
    merged, _, _ = merge([adapters[i] for i in order], [weights[i] for i in order], space=space)
    expected = combine([{"m": values} for _, values in parts], weights, space)
    torch.testing.assert_close(
        merged["m"].flatten(),
        torch.tensor(expected["m"], dtype=torch.float64),
        rtol=1e-9,
        atol=1e-9,
    )


def test_half_precision_is_rounded_once():
    parts = [column(1.0078125, 0.99609375, dtype=torch.bfloat16) for _ in range(3)]
    adapters = [adapter(f"a{i}", {"m": part}) for i, part in enumerate(parts)]
    merged, infos, _ = merge(adapters, [0.3, 0.3, 0.4])
    assert torch.equal(merged["m"], parts[0])
    assert merged["m"].dtype == infos["m"].dtype == torch.bfloat16


def test_the_dtype_holds_all_unless_given():
    adapters = [
        adapter("a", {"m": column(2.0, dtype=torch.bfloat16)}),
        adapter("b", {"m": column(2.0, dtype=torch.float16)}),
    ]
    assert merge(adapters, [1.0, 1.0])[0]["m"].dtype == torch.float32
    assert merge(adapters, [1.0, 1.0], dtype=torch.float16)[0]["m"].dtype == torch.float16


def test_rules_see_vectors_and_their_length():
    seen = []

    def spy(tensors, given):
        seen.append(([t.shape for t in tensors], {t.dtype for t in tensors}, given.short_side))
        return weighted(tensors, given)

    vectors = {"m": torch.full((1, 5), 1.5), "c": torch.ones(1, 4, 1, 1)}
    _, _, report = loras.merge(
        [adapter("a", vectors, {"m"})], replace(SUM, merge=spy), lambda module: call(1.0)
    )
    assert seen == [([(5,)], {torch.float64}, 1), ([(4,)], {torch.float64}, 1)]
    assert report["m"].pop("distance")["merged"] == pytest.approx(5**0.5 / 2)
    assert report["m"] == {"shape": [1, 5], "feedforward": True, "adapters": 1, "seen": 1}


def test_logarithms_need_positive_values_everywhere():
    vectors = {"m": column(1.0, -0.25), "n": column(0.0)}
    adapters = [adapter("a", vectors), adapter("b", {"m": column(1.0, 1.0)})]
    with pytest.raises(ConfigError) as error:
        merge_adapters(adapters, space="log")
    assert [p.where for p in error.value.problems] == ["m of adapter a", "n of adapter a"]
    assert "-0.25" in str(error.value) and "additive" in str(error.value)
    merge_adapters(adapters)
