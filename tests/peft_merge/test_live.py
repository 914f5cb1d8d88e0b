"""Merging inside a live PeftModel; each failure of `add_weighted_adapter` is a test here."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from mergekit_ext.errors import ConfigError, MergeWarning
from peft_merge import live
from peft_merge.io.read import adapters_of, load_adapter
from peft_merge.live import COMBINATION_TYPES, add_merged_adapter
from peft_merge.modules import rules
from tests.peft_merge import models


def model_of(kind, *changes):
    """A model with the adapters `default`, `a1`, `a2`, ... whose configurations differ so."""
    first, *others = [changed(kind, each) for each in changes]
    model = models.adapted(kind, 1, first)
    for i, config in enumerate(others, 1):
        models.add(model, f"a{i}", config, seed=i + 1)
    return model


def changed(kind, changes):
    return dataclasses.replace(kind.config(), **changes)


def answers(kind, model, name):
    active = model.active_adapter
    model.set_adapter(name)
    result = models.answer(kind, model)
    model.set_adapter(active)
    return result


def deltas(model, name):
    (adapter,) = adapters_of(model, [name])
    return {module: adapter.load(module).dense() for module in adapter.infos}


def exact_sum(model, names, weights):
    total: dict[str, Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        for module, delta in deltas(model, name).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def check_sum(model, names, weights):
    expected = exact_sum(model, names, weights)
    add_merged_adapter(model, names, weights, "merged")
    ours = deltas(model, "merged")
    assert ours.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(ours[module], delta, rtol=1e-4, atol=1e-5)


def state(model):
    """All that must not change."""
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "trained": {key: value.requires_grad for key, value in model.named_parameters()},
        "modes": {key: module.training for key, module in model.named_modules()},
        "active": (model.active_adapter, model.active_adapters),
        "configs": {name: copy.deepcopy(c.to_dict()) for name, c in model.peft_config.items()},
    }


def assert_kept(model, before, exactly):
    now = state(model)
    if exactly:
        assert all(now[key].keys() == before[key].keys() for key in ("tensors", "modes", "configs"))
    assert now["active"] == before["active"]
    for key, tensor in before["tensors"].items():
        assert torch.equal(now["tensors"][key], tensor), key
    for part in ("trained", "modes", "configs"):
        assert {key: now[part][key] for key in before[part]} == before[part]


LIVE = sorted(set(models.KINDS))


@pytest.mark.parametrize("name", LIVE)
def test_one_adapter_with_weight_one_is_the_same_function(name):
    kind = models.KINDS[name]
    model = models.adapted(kind, 1)
    expected = models.answer(kind, model)
    before = state(model)
    report = add_merged_adapter(model, ["default"], [1.0], "merged")
    assert_kept(model, before, exactly=False)
    assert report["method"] == "linear"
    torch.testing.assert_close(models.answer(kind, model), expected, rtol=0, atol=0)
    torch.testing.assert_close(answers(kind, model, "merged"), expected, rtol=2e-3, atol=2e-3)
    with model.disable_adapter():
        assert (models.answer(kind, model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", LIVE)
def test_adapters_of_a_model_are_what_saving_and_reading_gives(name, tmp_path):
    kind = models.KINDS[name]
    model = models.adapted(kind, 1)
    names = ["default"]
    if name in ("plain", "ia3", "modules_to_save", "nested_parameters"):
        models.add(model, "second", kind.config(), seed=2)
        names.append("second")
    before = state(model)
    found = adapters_of(model, names)
    model.save_pretrained(tmp_path)
    for live_one, folder in zip(found, (tmp_path, tmp_path / "second"), strict=False):
        read = load_adapter(folder)
        assert type(live_one) is type(read) and dict(live_one.infos) == dict(read.infos)
        for module in live_one.infos:
            one, other = live_one.load(module), read.load(module)
            if kind.lora:
                assert one.scale == other.scale and not one.a.requires_grad
                one, other = torch.cat([one.a, one.b.mT], 2), torch.cat([other.a, other.b.mT], 2)
            assert torch.equal(one, other)
        embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
        if live_one.config.get("modules_to_save"):
            embeddings = set()
        assert set(live_one.saved) == set(read.saved) - embeddings
        for key, tensor in live_one.saved.items():
            assert torch.equal(tensor(), read.saved[key]())
    assert [adapter.name for adapter in found] == names
    assert_kept(model, before, exactly=True)


def test_unknown_names_and_refused_kinds_come_together():
    model = model_of(models.KINDS["plain"], {}, {"use_dora": True})
    with pytest.raises(ConfigError) as raised:
        adapters_of(model, ["default", "a1", "absent"])
    assert len(raised.value.problems) == 2
    assert "DoRA" in str(raised.value) and "absent" in str(raised.value)
    add_merged_adapter(model, ["default"], [1.0], "merged")  # beside the one that is refused


HEADS = pytest.mark.filterwarnings("ignore:.*save whole, which is no head")
FAILURES = {
    "rslora": ({"use_rslora": True}, {}),
    "alpha": ({"lora_alpha": 32}, {"lora_alpha": 2}),
    "rank": ({"r": 6}, {"r": 2}),
    "rank_pattern": ({"rank_pattern": {"v_proj": 1}}, {"alpha_pattern": {"q_proj": 40}}),
    "list_and_regex": ({"target_modules": r".*(q|v)_proj"}, {}),
    "other_modules": ({"target_modules": ["up_proj", "q_proj"]}, {"target_modules": ["v_proj"]}),
}


@pytest.mark.filterwarnings("ignore:.*share 0 of the 2 modules")
@pytest.mark.parametrize("name", sorted(FAILURES))
def test_sums_are_exact_where_peft_fails(name):
    model = model_of(models.KINDS["plain"], *FAILURES[name])
    check_sum(model, ["default", "a1"], [0.8, -1.7])


def test_target_parameters_are_merged():
    model = model_of(models.KINDS["nested_parameters"], {}, {})
    check_sum(model, ["default", "a1"], [1.0, 0.25])


def test_modules_to_save_are_averaged_taken_or_dropped():
    kind = models.KINDS["modules_to_save"]
    model = model_of(kind, {}, {})
    heads = [each.saved["classifier.weight"]() for each in adapters_of(model, ["default", "a1"])]
    with pytest.warns(MergeWarning, match="classifier.*Set `modules_to_save`"):
        add_merged_adapter(model, ["default", "a1"], [3.0, 1.0], "mean")
    add_merged_adapter(model, ["default", "a1"], [3.0, 1.0], "second", modules_to_save="a1")
    add_merged_adapter(model, ["default", "a1"], [3.0, 1.0], "none", modules_to_save="drop")
    mean, second, none = adapters_of(model, ["mean", "second", "none"])
    torch.testing.assert_close(mean.saved["classifier.weight"](), 0.75 * heads[0] + 0.25 * heads[1])
    assert torch.equal(second.saved["classifier.weight"](), heads[1])
    own = models.base(kind).state_dict()["classifier.weight"]
    assert torch.equal(none.saved["classifier.weight"](), own)


def test_a_head_of_one_adapter_is_not_dropped_silently():
    kind = models.KINDS["plain"]
    model = model_of(kind, {}, {"modules_to_save": ["lm_head"]})
    before = state(model)
    with pytest.raises(ConfigError, match="modules_to_save"):
        add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], "merged")
    assert_kept(model, before, exactly=True)
    add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], "merged", modules_to_save="a1")
    ours, theirs = adapters_of(model, ["merged", "a1"])
    assert torch.equal(ours.saved["lm_head.weight"](), theirs.saved["lm_head.weight"]())


@HEADS
def test_biases_of_the_base_act_with_every_adapter():
    kind = models.KINDS["bias_all"]
    model = model_of(kind, {}, {"bias": "none"})
    check_sum(model, ["default", "a1"], [0.5, 0.5])
    add_merged_adapter(model, ["a1"], [1.0], "again")
    torch.testing.assert_close(
        answers(kind, model, "again"), answers(kind, model, "a1"), rtol=1e-4, atol=1e-4
    )


def test_wrong_arguments_are_said_at_once_and_change_nothing():
    model = model_of(models.KINDS["plain"], {}, {})
    before = state(model)
    with pytest.raises(ConfigError) as error:
        add_merged_adapter(
            model,
            ["default", "defualt"],
            [1.0],
            "a1",
            "ties_svd",
            svd_clamp=0.9,
            svd_rank=2,
            rank=3,
        )
    text = str(error.value)
    assert [p.where for p in error.value.problems] == [
        "adapter_name",
        "adapters",
        "density",
        "svd_clamp",
        "svd_rank",
    ]
    assert "Write `default`" in text and "density=0.5" in text
    assert_kept(model, before, exactly=True)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"combination_type": "tie"}, "Write `ties`"),
        ({"method": "tsv"}, "Write `tsv_m`"),
        ({"method": "linear", "combination_type": "svd"}, "one of the two"),
        ({"combination_type": "svd", "density": 0.5}, "a parameter that `linear` does not have"),
        ({"combination_type": "magnitude_prune", "density": 1.5}, "density"),
        (
            {"combination_type": "linear", "majority_sign_method": "frequency"},
            "a parameter that `linear` does not have",
        ),
        ({"method": "tsv", "adapter_name": None}, "method: found 'tsv'"),
        ({"adapter_name": "x.y"}, "without dots"),
        ({"adapter_name": None}, "adapter_name"),
        ({"adapter_name": "half"}, "attribute"),
        ({"adapters": ["default", "default"]}, "more than once"),
        ({"adapters": "default"}, "a list of names"),
        ({"densty": 0.5, "method": "ties"}, "density"),
        ({"weights": [1.0, float("nan")]}, "weight"),
        ({"weights": [1.0]}, r"weights: found \[1.0\]; expected a list of 2"),
        ({"method": "flexmerge"}, "one adapter"),
    ],
)
def test_each_wrong_argument_has_its_message(arguments, word):
    model = model_of(models.KINDS["plain"], {}, {})
    given = {"adapters": ["default", "a1"], "weights": [1.0, 1.0], "adapter_name": "m"}
    with pytest.raises(ConfigError, match=word):
        add_merged_adapter(model, **{**given, **arguments})
    assert list(model.peft_config) == ["default", "a1"]


def test_not_a_peft_model():
    with pytest.raises(TypeError, match="Linear"):
        add_merged_adapter(nn.Linear(1, 1), ["a"], [1.0], "b")


def test_positions_and_names_are_those_of_peft():
    theirs = list(inspect.signature(LoraModel.add_weighted_adapter).parameters)[1:]
    ours = list(inspect.signature(add_merged_adapter).parameters)[1:]
    assert ours[: len(theirs)] == theirs


def test_every_combination_type_of_peft_is_known():
    theirs = inspect.signature(LoraModel.add_weighted_adapter).parameters["combination_type"]
    assert set(re.findall(r"['\"](\w+)['\"]", str(theirs.annotation))) == set(COMBINATION_TYPES)
    for meaning in COMBINATION_TYPES.values():
        known = {parameter.name for parameter in rules()[meaning.method].parameters}
        assert set(meaning.parameters) <= known


@pytest.mark.parametrize("combination_type", ["svd", "ties_svd", "magnitude_prune_svd", "cat"])
def test_equals_peft_where_peft_is_right(combination_type):
    """At full rank PEFT's dense types cut nothing off."""
    kind = models.KINDS["plain"]
    fields = {"target_modules": ["q_proj"]}
    model = model_of(kind, fields, {**fields, "lora_alpha": 9})
    names, weights = ["default", "a1"], [1.5, 0.5]
    options: dict[str, Any] = {"combination_type": combination_type}
    if combination_type.endswith("svd"):
        options["svd_rank"] = 16
    if combination_type in ("ties_svd", "magnitude_prune_svd"):
        options["density"] = 0.4
    model.add_weighted_adapter(names, weights, "theirs", **options)
    add_merged_adapter(model, names, weights, "ours", **options)
    theirs, ours = deltas(model, "theirs"), deltas(model, "ours")
    for module, delta in theirs.items():
        torch.testing.assert_close(ours[module], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination_type", sorted(COMBINATION_TYPES))
def test_every_combination_type_runs_and_says_its_error(combination_type):
    model = model_of(models.KINDS["plain"], {}, {"r": 2})
    options = {} if COMBINATION_TYPES[combination_type].method == "linear" else {"density": 0.6}
    report = add_merged_adapter(
        model, ["default", "a1"], [1.0, 1.0], "m", combination_type, **options
    )
    errors = [entry["error"] for entry in report["modules"].values()]
    assert len(errors) == 4
    if not options:
        assert max(errors) < 1e-6
    assert {entry["rank"] for entry in report["modules"].values()} == {6}


def test_weights_may_be_tensors_or_left_out():
    model = model_of(models.KINDS["plain"], {}, {})
    check_sum(model, ["default", "a1"], torch.tensor([0.5, 0.25]))
    add_merged_adapter(
        model, ["default", "a1"], adapter_name="left_out", method="task_arithmetic", lambda_=0.5
    )
    expected = exact_sum(model, ["default", "a1"], [0.5, 0.5])
    for module, delta in deltas(model, "left_out").items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-4, atol=1e-5)


def test_rank_and_space_are_passed_on():
    model = model_of(models.KINDS["plain"], {}, {})
    names, weights = ["default", "a1"], [1.0, 1.0]
    report = add_merged_adapter(model, names, weights, "m", "svd", 3, None, True, "gesvd")
    assert {entry["rank"] for entry in report["modules"].values()} == {3}
    model = models.adapted(models.KINDS["ia3"], 1)
    add_merged_adapter(model, ["default"], [2.0], "squared", space="log")
    one, squared = adapters_of(model, ["default", "squared"])
    for module in squared.infos:
        torch.testing.assert_close(squared.load(module), one.load(module) ** 2)


def test_dtype_follows_the_adapters_not_the_base():
    kind = models.KINDS["plain"]
    half = models.base(kind).to(torch.bfloat16)
    model = PeftModel(half, kind.config())  # PEFT keeps such adapters in float32
    models.randomise(model, "default", 3)
    add_merged_adapter(model, ["default"], [1.0], "wide")
    add_merged_adapter(model, ["default"], [1.0], "narrow", dtype=torch.bfloat16)
    dtypes = {
        name: {p.dtype for key, p in model.named_parameters() if f".{name}." in key}
        for name in ("default", "wide", "narrow")
    }
    assert dtypes == {
        "default": {torch.float32},
        "wide": {torch.float32},
        "narrow": {torch.bfloat16},
    }


def test_dropout_follows_the_mode_of_the_model():
    model = model_of(models.KINDS["plain"], {"lora_dropout": 0.5}, {"lora_dropout": 0.5})
    for mode, name in ((False, "m0"), (True, "m1")):
        model.train(mode)
        add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], name)
        parts = [m for key, m in model.named_modules() if key.endswith(f"lora_dropout.{name}")]
        assert parts and all(part.training is mode for part in parts)


def test_what_is_active_and_trained_stays():
    model = model_of(models.KINDS["plain"], {}, {})
    model.set_adapter("a1")
    before = state(model)
    assert any(before["trained"].values())
    add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], "m")
    assert_kept(model, before, exactly=False)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".m." in key)
    model.set_adapter("m")
    assert model.active_adapters == ["m"]


@HEADS
@pytest.mark.parametrize("in_a_layer", [True, False])
@pytest.mark.parametrize("name", ["plain", "ia3", "modules_to_save", "nested_parameters"])
def test_an_add_that_fails_leaves_the_model_as_it_was(name, in_a_layer, monkeypatch):
    model = model_of(models.KINDS[name], {}, {})
    before, tuner = state(model), type(model.base_model)
    genuine, calls = tuner._create_and_replace, []

    def fail(*arguments, **more):
        calls.append(1)
        if not in_a_layer or len(calls) == 2:
            raise RuntimeError("no memory")
        return genuine(*arguments, **more)

    place = (tuner, "_create_and_replace") if in_a_layer else (peft, "set_peft_model_state_dict")
    with monkeypatch.context() as patched:
        patched.setattr(*place, fail)
        with pytest.raises(RuntimeError, match="no memory"):
            add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], "m")
    assert_kept(model, before, exactly=True)
    add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], "m")


def test_a_tensor_without_a_place_is_an_error(monkeypatch):
    model = model_of(models.KINDS["plain"], {}, {})
    before = state(model)
    genuine = live.state_dict
    monkeypatch.setattr(
        live, "state_dict", lambda adapter: {**genuine(adapter), "base_model.x": torch.ones(1)}
    )
    with pytest.raises(ConfigError, match=r"the model lacks: base_model\.x"):
        add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], "m")
    assert_kept(model, before, exactly=True)


def test_the_new_adapter_is_saved_and_loaded(tmp_path):
    kind = models.KINDS["patterns"]
    model = model_of(kind, {}, {"rank_pattern": {"up_proj": 1}})
    add_merged_adapter(model, ["default", "a1"], [1.0, 0.5], "m")
    expected = answers(kind, model, "m")
    model.save_pretrained(tmp_path, selected_adapters=["m"])
    again = models.reloaded(kind, tmp_path / "m")
    torch.testing.assert_close(models.answer(kind, again), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_is_merged_again():
    model = model_of(models.KINDS["plain"], {}, {})
    add_merged_adapter(model, ["default", "a1"], [1.0, 1.0], "m")
    check_sum(model, ["m", "a1"], [0.5, -0.5])
    model.delete_adapter("m")
    assert list(model.peft_config) == ["default", "a1", "merged"]
