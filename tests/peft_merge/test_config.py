"""Configurations: what is understood, and every mistake in one error."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ext.errors import (
    ConfigError,
    MergeError,
    MergeWarning,
    UniformCoefficientsWarning,
)
from peft_merge.io.compatible import DifferentBasesWarning
from peft_merge.merge import check, merge_adapters
from tests.peft_merge.edit import change_config
from tests.peft_merge.models import KINDS, saved


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two LoRAs of different ranks, and an (IA)^3, of one base."""
    place = tmp_path_factory.mktemp("adapters")
    return {
        "one": saved(KINDS["plain"], place / "one", 1),
        "two": saved(KINDS["plain"], place / "two", 2, r=3),
        "ia3": saved(KINDS["ia3"], place / "ia3", 3),
        "heads": saved(KINDS["modules_to_save"], place / "heads", 4),
        "more_heads": saved(KINDS["modules_to_save"], place / "more_heads", 5),
        "no_head": saved(KINDS["lora_bias"], place / "no_head", 6),
    }


def document(folders, *names, **others):
    return {
        "merge_method": "linear",
        "models": [{"model": str(folders[name])} for name in names],
        **others,
    }


def problems_of(config, **options):
    with pytest.raises(ConfigError) as caught:
        check(config, **options)
    return [str(problem) for problem in caught.value.problems]


def the_problem(config, **options):
    (problem,) = problems_of(config, **options)
    return problem


def test_a_plan_of_a_plain_merge(folders):
    plan = check(document(folders, "one", "two"))
    assert plan.kind == "lora"
    assert [adapter.name for adapter in plan.adapters] == ["one", "two"]
    assert plan.dtype == torch.float32
    assert (plan.rank, plan.space, plan.seed, plan.notes) == (None, "delta", 0, ())
    values = plan.resolve(plan.modules[0])
    assert list(values.weights) == [1.0, 1.0]
    assert values.options == {"normalize": True}


def test_values_by_model_layer_and_filter(folders):
    config = document(folders, "one", "two", merge_method="ties")
    config["parameters"] = {"density": [0.2, 0.6], "weight": 0.5}
    config["models"][0]["parameters"] = {
        "density": [{"filter": "q_proj", "value": 0.9}],
        "weight": {"filter": "layers.1", "value": "2e0"},
    }
    plan = check(config)
    seen = {module: plan.resolve(module) for module in plan.modules}
    for module, values in seen.items():
        last = "layers.1" in module
        assert list(values.weights) == [2.0 if last else 0.5, 0.5]
        own, other = (each["density"] for each in values.each)
        assert other == (0.6 if last else 0.2)
        assert own == (0.9 if "q_proj" in module else other)


def test_names_and_dtype_and_base(folders):
    config = document(folders, "one", dtype="bfloat16", rank={"energy": 0.9}, seed=7)
    config["models"].append({"model": str(folders["one"]), "name": "again"})
    plan = check(config)
    assert [adapter.name for adapter in plan.adapters] == ["one", "again"]
    assert (plan.dtype, plan.seed) == (torch.bfloat16, 7)


def test_the_default_dtype_holds_all_inputs(folders, tmp_path):
    half = saved(KINDS["plain"], tmp_path / "half", 1, torch.bfloat16)
    other = saved(KINDS["plain"], tmp_path / "other", 1, torch.float16)
    for chosen, dtype in (([half], torch.bfloat16), ([half, other], torch.float32)):
        config = {"merge_method": "linear", "models": [{"model": str(f)} for f in chosen]}
        assert check(config).dtype == dtype


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merge_method": "linaer"}, "merge_method: found 'linaer'.* Write `linear`"),
        ({"merge_method": ["linear"]}, r"merge_method: found \['linear'\].*the command `tune`"),
        ({"parameters": {"weight": {"from": 0, "to": 1}}}, "weight: found {.*the command `tune`"),
        ({"rank": {"choose": [2, 4]}}, "rank: found {.*the command `tune`"),
        ({"mergemethod": "ties"}, "mergemethod: found an unknown key.*Write `merge_method`"),
        ({"slices": []}, "slices: found a key for full models.*adapters are merged whole"),
        ({"out_dtype": "float16"}, "Write `dtype`"),
        ({"tokenizer_source": "union"}, "have no tokenizer"),
        ({"dtype": "bfloat"}, "dtype: found 'bfloat'.*Write `bfloat16`"),
        ({"dtype": "int8"}, "dtype: found 'int8'; expected 'float32', "),
        ({"dtype": 16}, "dtype: found 16"),
        ({"rank": 0}, "rank: found 0; expected a whole number from 1"),
        ({"rank": True}, "rank: found True"),
        ({"rank": 2.5}, "rank: found 2.5"),
        ({"rank": 17}, "rank: found 17; expected at most 16"),
        ({"rank": "losless"}, "rank: found 'losless'; .* Write `lossless`"),
        ({"parameters": {"weight": 1e308}}, "parameters.weight: found 1e\\+308"),
        ({"rank": "energy=1.9"}, "rank: found 'energy=1.9'"),
        ({"rank": {"energy": 1.5}}, "share above 0 up to 1"),
        ({"rank": {}}, "rank: found {}"),
        ({"rank": {"enrgy": 0.5}}, "rank: found"),
        ({"space": "dleta"}, "space: found 'dleta'.*Write `delta`"),
        ({"space": "log"}, "space: found 'log'; expected for LoRA one of delta"),
        ({"space": ["delta"]}, "space: found"),
        ({"space": "factors"}, "different ranks in .*q_proj"),
        ({"seed": -1}, r"seed: found -1; expected .* below 2\^63"),
        ({"seed": True}, "seed: found True"),
        ({"modules_to_save": "avrage"}, "modules_to_save: found 'avrage'.*Write `average`"),
        ({"modules_to_save": 1}, "modules_to_save: found 1"),
        ({"base_model": 7}, "base_model: found 7; expected a model's name"),
        ({"parameters": [1]}, r"parameters: found \[1\]; expected a mapping"),
        (
            {"parameters": {"weigth": 1}},
            "parameters.weigth: found a parameter that `linear` does",
        ),
        (
            {"parameters": {"normalize": 1}},
            "parameters.normalize: found 1; expected a valid boolean",
        ),
        ({"parameters": {"weight": float("nan")}}, "parameters.weight: found nan"),
        ({"merge_method": "lore"}, "none of mu, mu_relative, rank_ratio"),
        (
            {"merge_method": "nan", "parameters": {"granularity": ["tensor", "model"]}},
            "parameters.granularity: found model and tensor, by module",
        ),
    ],
)
def test_one_mistake_gives_one_problem(folders, change, said):
    config = document(folders, "one", "two", **change)
    problem = the_problem(config)
    assert re.search(said, problem), problem


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("./one", r"models\[2\]: found './one'.*Write `- model: ./one`"),
        ({"modle": "x"}, r"models\[2\].modle: found an unknown key.*Write `model`"),
        ({"model": 3}, r"models\[2\].model: found 3"),
        ({"model": "base+adapter"}, "the base is not needed"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model": "one", "name": "a/b"}, r"models\[2\].name: found 'a/b'"),
        ({"model": "one", "name": 3}, r"models\[2\].name: found 3"),
    ],
)
def test_mistakes_in_an_entry(folders, entry, said):
    config = document(folders, "one", "two")
    if isinstance(entry, dict) and entry.get("model") == "one":
        entry = {**entry, "model": str(folders["one"])}
    config["models"].append(entry)
    assert any(re.search(said, problem) for problem in problems_of(config))


def test_parameters_of_the_merge_do_not_stand_under_a_model(folders):
    config = document(folders, "one")
    config["models"][0]["parameters"] = {"normalize": False, "weight": "much"}
    first, second = problems_of(config)
    assert first.startswith("models[0].parameters.normalize: found a parameter of the whole merge")
    assert second.startswith("models[0].parameters.weight: found 'much'")


def test_all_mistakes_at_once(folders, tmp_path):
    config = document(folders, "one", "one", "ia3", dtype="x", seed="y", rank="z", sede=3)
    config["parameters"] = {"normalise": True, "weight": [1, "two"]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    found = problems_of(config, out=tmp_path / "out", device="abacus")
    for start in (
        *("dtype:", "seed:", "rank:", "sede:", "parameters.normalise:", "parameters.weight[1]:"),
        *("models: found 2 adapters called 'one'", "adapters:", "device:"),
        f"{tmp_path / 'out'}:",
    ):
        assert [problem for problem in found if problem.startswith(start)], start


def test_ia3_has_no_rank_and_its_own_spaces(folders):
    assert check(document(folders, "ia3")).space == "additive"
    assert check(document(folders, "ia3", space="log")).space == "log"
    assert "no rank" in the_problem(document(folders, "ia3", rank=4))
    assert "(IA)^3 one of additive, log" in the_problem(document(folders, "ia3", space="delta"))


def test_the_base_is_no_adapter(folders):
    config = document(folders, "one", base_model="some/base")
    config["models"].append({"model": "some/base"})
    assert the_problem(config) == (
        "models[1].model: found the base model; expected an adapter alone. Take it out: the base "
        "is not needed."
    )


def test_filters_that_match_nothing_are_noted(folders):
    config = document(folders, "one")
    config["parameters"] = {"weight": [{"filter": "mpl", "value": 2}, {"value": 1}]}
    (note,) = check(config).notes
    assert note == "parameters.weight: the filter 'mpl' matches no adapted module."


def test_heads_are_averaged_dropped_or_taken(folders):
    both = document(folders, "heads", "more_heads")
    name = "classifier.weight"
    with pytest.warns(MergeWarning, match="no head of any of their tasks"):
        assert check(both).saved[name] == (0, 1)
    assert check({**both, "modules_to_save": "average"}).saved[name] == (0, 1)
    assert check({**both, "modules_to_save": "more_heads"}).saved[name] == (1,)
    assert check({**both, "modules_to_save": "drop"}).saved == {}
    both["parameters"] = {"weight": [{"filter": "classifier", "value": 0}, {"value": 1}]}
    assert all("weights that sum to 0" in problem for problem in problems_of(both))


@pytest.mark.parametrize(
    ("method", "parameters", "where"),
    [
        ("linear", {"weight": 0}, ""),
        ("linear", {"weight": [{"filter": "q_proj", "value": 0}, {"value": 1}]}, "q_proj"),
        ("nan_linear", {"weight": 0}, ""),
        ("task_arithmetic", {"normalize": True, "weight": 0}, ""),
        ("dare_linear", {"normalize": True, "weight": 0}, ""),
        ("lore", {"mu": 0, "combine": "mean", "weight": 0}, ""),
    ],
)
def test_weights_that_are_divided_by_may_not_sum_to_0(folders, method, parameters, where):
    config = document(folders, "one", "two", merge_method=method, parameters=parameters)
    problem = the_problem(config)
    assert problem.startswith("parameters.weight: found weights that sum to 0") and where in problem


def test_weights_of_opposite_signs(folders):
    config = document(folders, "one", "two")
    for entry, weight in zip(config["models"], ([1, 1], [1, -1]), strict=True):
        entry["parameters"] = {"weight": weight}
    problem = the_problem(config)
    assert "sum to 0 for" in problem and "layers.1" in problem and "layers.0" not in problem
    assert check({**config, "parameters": {"normalize": False}}).kind == "lora"
    # NAN's coefficients come in between
    assert check({**config, "merge_method": "nan_linear"}).kind == "lora"
    config["models"][1]["parameters"] = {"weight": -0.5}
    assert check(config).kind == "lora"


def test_nan_may_make_weights_cancel(folders):
    again = {"one": folders["one"], "again": folders["one"]}
    with (
        pytest.warns(UniformCoefficientsWarning),
        pytest.raises(MergeError, match="weights that sum to 0"),
    ):
        merge_adapters(again, "nan_linear", weights=[1, -1])


def test_an_unknown_method_hides_nothing_else(folders):
    config = document(folders, "heads", "more_heads", merge_method="tise", space="dleta", rank=99)
    config["parameters"] = {"weight": "much", "density": 0.5, "target_size": 2}
    config["modules_to_save"] = "drp"
    found = problems_of(config)
    starts = ("merge_method:", "rank:", "space:")
    assert len(found) == 4
    for start in (*starts, "modules_to_save:"):
        assert any(problem.startswith(start) for problem in found), start


def test_a_wrong_parameter_hides_nothing_else(folders):
    config = document(folders, "one", "two", space="dleta", modules_to_save="drp")
    config["parameters"] = {"normalise": True}
    assert len(problems_of(config)) == 3


@pytest.mark.filterwarnings("error")
def test_different_bases_are_a_warning_of_merges_that_go_ahead(folders, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(folders[name], tmp_path / name)
        change_config(tmp_path / name, base_model_name_or_path=f"base-of-{name}")
    other = {name: tmp_path / name for name in ("one", "two")}
    assert len(problems_of(document(other, "one", "two", rank=0))) == 1
    with pytest.warns(DifferentBasesWarning, match="base-of-one"):
        check(document(other, "one", "two"))
    with pytest.warns(DifferentBasesWarning, match=r"base-of-one \(one\), b \(base_model\)"):
        check(document(other, "one", base_model="b"))


def test_weights_of_heads_may_not_cancel_but_for_rounding(folders):
    three = document(folders, "heads", "more_heads", "heads")
    three["models"][2]["name"] = "again"
    for entry, weight in zip(three["models"], (0.1, 0.2, -0.3), strict=True):
        entry["parameters"] = {"weight": weight}
    assert all("weights that sum to 0" in problem for problem in problems_of(three))


def test_heads_that_only_some_have_need_a_word(folders):
    mixed = document(folders, "heads", "no_head")
    problem = the_problem(mixed)
    assert problem.startswith(
        "classifier.bias, classifier.weight: found whole tensors that no_head"
    )
    assert "Say which to take with `modules_to_save`" in problem
    assert check({**mixed, "modules_to_save": "average"}).saved["classifier.weight"] == (0,)
    assert check({**mixed, "modules_to_save": "no_head"}).saved == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: [", "expected YAML"),
        ("- 1", "one mapping"),
        ("a: 1\n---\nb: 2", "2 documents"),
        ("", "one mapping"),
        ("a: &a [*a]", "fewer levels"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, said):
    file = tmp_path / "merge.yml"
    file.write_text(text)
    assert said in the_problem(file)
    assert "cannot be read" in the_problem(tmp_path / "missing.yml")


def test_keys_given_twice(folders, tmp_path):
    file = tmp_path / "merge.yml"
    file.write_text(
        f"merge_method: linear\nmodels:\n- model: {folders['one']}\n"
        "parameters:\n  weight: 1\n  weight: 2\n"
    )
    assert "parameters.weight: found the key twice, on lines 5 and 6" in the_problem(file)


def test_arguments_from_python(folders):
    with pytest.raises(ConfigError) as caught:
        merge_adapters(
            [folders["one"], folders["two"]],
            "tise",
            weights=[1.0],
            each=[{"weight": 1.0}, {}, {}],
        )
    text = str(caught.value)
    for said in ("Write `ties`", "weights: found [1.0]; expected a list of 2", "each: found"):
        assert said in text
    with pytest.raises(ConfigError, match=r"each\[0\].weight: found a weight in `weights` too"):
        merge_adapters([folders["one"]], weights=[1.0], each=[{"weight": 1.0}])
    with pytest.raises(TypeError, match="a list"):
        merge_adapters(str(folders["one"]))
    with pytest.raises(ConfigError, match="one adapter at least"):
        merge_adapters([])
    with pytest.raises(ConfigError, match=r"weights: found .* expected a list"):
        merge_adapters({"a": folders["one"], "b": folders["two"]}, weights={"a": 1, "b": 2})


_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("one")
)
_KEYS = """model name parameters merge_method models rank space seed dtype modules_to_save
    base_model value filter density weight energy"""
_texts = st.sampled_from(_KEYS.split())
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(_texts, _leaves), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(_texts, _values, max_size=4), _values, _values)
@settings(max_examples=60)
def test_nothing_but_one_error_whatever_is_written(folders, changes, parameters, own):
    config = document(folders, "one", "two", merge_method="della")
    config["models"][0] |= {"parameters": own}
    config |= {"parameters": parameters, **changes}
    try:
        plan = check(config)
    except ConfigError as error:
        assert all(problem.where and problem.found for problem in error.problems)
    else:
        assert all(plan.resolve(module) for module in plan.modules)
