"""`mergekit_ext.merge_models`: the numbers of the YAML merge, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import BasePolicy, ParameterScope
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mergekit_ext
from mergekit_ext.errors import ConfigError, NonFiniteError, OvershootWarning, TwoModelsWarning
from tests.models import config, family, state

mergekit_ext.register()
SPECS = {
    method.spec.name: method.spec
    for method in merge_methods.registered_methods()
    if method.spec.name not in ("flexmerge", "decompose")
}
# What methods require, and what is worth varying.
VALUES: dict[str, Any] = {"t": 0.3, "select_topk": 0.5, "density": [0.5, 0.4, 0.8], "epsilon": 0.1}
ALSO: dict[str, dict[str, Any]] = {
    "lore": {"mu_relative": 0.1, "lambda": 0.5},
    "nan_lore": {"mu_relative": 0.1},
    "nan": {"granularity": "block", "scale": 0.7},
    "nan_ties": {"granularity": "model"},
    "nan_task_arithmetic": {"scale": "auto"},
    "tsv_m": {"lambda": "auto"},
}
QUIET = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=7)


def make(tied: bool = True) -> Any:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return family(tmp_path_factory.mktemp("models"), make)


@pytest.fixture(scope="module")
def live(saved: tuple[Path, list[Path]]) -> list[Any]:
    """The base, and its fine-tunes."""
    return [AutoModelForCausalLM.from_pretrained(path) for path in (saved[0], *saved[1])]


def arguments(name: str) -> tuple[int, bool, dict[str, Any]]:
    """How many models a method takes, whether over a base, and parameters."""
    spec, contract = SPECS[name], SPECS[name].contract
    based = contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
    count = min(contract.max_non_base or 3, (contract.max_inputs or 4) - based, 3)
    given = dict(ALSO.get(name, {}))
    for parameter in spec.parameters:
        value = VALUES.get(parameter.name, 1.0 if parameter.name == "weight" else None)
        if parameter.name == "weight":
            value = [0.5, 1.0, 0.7]
        if isinstance(value, list):
            value = value[:count] if parameter.scope != ParameterScope.SHARED else value[0]
        if value is not None:
            given.setdefault(parameter.name, value)
    return count, based, given


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_numbers_are_those_of_the_yaml(
    name: str, saved: Any, live: Any, tmp_path: Path
) -> None:
    count, based, given = arguments(name)
    document = config(name, saved[1][:count], saved[0] if based else None)
    shared = {key: value for key, value in given.items() if not isinstance(value, list)}
    for i, model in enumerate(document["models"]):
        own = {key: value[i] for key, value in given.items() if isinstance(value, list)}
        model["parameters"] = own
    mergekit_ext.merge({**document, "parameters": shared}, tmp_path / "out", QUIET)
    expected = state(tmp_path / "out")
    before = [copy.deepcopy(model.state_dict()) for model in live]
    given = {f"{key}_" if key == "lambda" else key: value for key, value in given.items()}
    base = live[0] if based else None
    merged = mergekit_ext.merge_models(live[1 : count + 1], name, base=base, seed=7, **given)
    assert type(merged) is type(live[0])
    found = merged.state_dict()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    for model, old in zip(live, before, strict=True):
        assert all(torch.equal(tensor, old[key]) for key, tensor in model.state_dict().items())


def test_state_dicts_give_a_state_dict_and_numpy_weights_count(live: Any) -> None:
    base, *tuned = live
    states = {f"model {i}": model.state_dict() for i, model in enumerate(tuned)}
    weights = torch.tensor([0.5, 0.25, 0.25]).numpy()
    merged = mergekit_ext.merge_models(states, "linear", weights=weights)
    assert list(merged) == list(base.state_dict())
    name = "model.norm.weight"
    expected = sum(
        w * s[name].double() for w, s in zip([0.5, 0.25, 0.25], states.values(), strict=True)
    )
    assert torch.allclose(merged[name].double(), expected, atol=1e-7)
    assert merged["lm_head.weight"].data_ptr() == merged["model.embed_tokens.weight"].data_ptr()


class Counted(torch.nn.Module):
    """With what modules of torch have besides floating parameters."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.norm.num_batches_tracked += count
        self.register_buffer("positions", torch.arange(count))


def test_any_module_is_merged() -> None:
    torch.manual_seed(0)
    one, other = Counted().eval(), Counted()
    other.norm.num_batches_tracked += 1
    merged = mergekit_ext.merge_models([one, other], "linear", weight=0.5)
    assert type(merged) is Counted and not merged.training
    assert merged.norm.num_batches_tracked == 3 and merged.positions.tolist() == [0, 1, 2]
    mean = (one.layer.weight + other.layer.weight) / 2
    assert torch.allclose(merged.layer.weight, mean) and merged.layer.weight.requires_grad
    alone = mergekit_ext.merge_models([one], "passthrough")
    assert torch.equal(alone.layer.weight, one.layer.weight)
    state = mergekit_ext.merge_models([one.state_dict()], "passthrough")
    assert state["layer.weight"].data_ptr() != one.layer.weight.data_ptr()


@pytest.mark.parametrize(
    ("models", "method", "given", "messages"),
    [
        ("ab", "nan_tsi", {}, ["method: found 'nan_tsi'", "Write `nan_ties`"]),
        ("ab", "ties", {}, ["base: found nothing; expected a base model", "Give `base`"]),
        ("ab", "lore", {"base": "c", "mu": -1}, ["parameters.mu: found -1"]),
        (
            "ab",
            "nan_ties",
            {"base": "c", "densty": 0.5, "scale": [1, 2]},
            ["parameters.densty", "Write `density`", "scale: found [1, 2]; expected one value."],
        ),
        ("ab", "linear", {"weights": [1, 2, 3]}, ["expected one value, or a list of 2, one for"]),
        ("ab", "linear", {"weights": [1, "x"]}, ["models[1].parameters.weight: found 'x'"]),
        ("ab", "nan_della", {"base": "c", "density": 0.1}, ["epsilon"]),
        ("ab", "flexmerge", {"base": "c"}, ["expected a method that makes one model"]),
        ("ab", "nan", {"heads": "a"}, ["heads: found it; expected nothing"]),
        ("a4", "linear", {"weight": 1}, ["models[1]: found a int; expected a torch module"]),
        (
            "ad",
            "linear",
            {"weight": 1},
            ["positions: found [4] on cpu", "in models[1]; expected [3]"],
        ),
        ("ab", "slerp", {"t": 2, "base": "c"}, ["3 models", "takes"]),
        ("", "linear", {"weight": 1}, ["models: found []; expected a list of one model"]),
    ],
)
def test_what_is_refused(models: str, method: str, given: Any, messages: list[str]) -> None:
    known: dict[str, Any] = {name: Counted() for name in "abc"} | {"4": 4, "d": Counted(4)}
    if "base" in given:
        given = {**given, "base": known[given["base"]]}
    with pytest.raises(ConfigError) as raised:
        mergekit_ext.merge_models([known[name] for name in models], method, **given)
    for message in messages:
        assert message in str(raised.value), str(raised.value)


def test_codes_are_refused_in_one_problem_for_all_models() -> None:
    codes = {"weight": torch.ones(4, 1, dtype=torch.uint8), "weight.absmax": torch.ones(1)}
    with pytest.raises(ConfigError, match="dequantize") as raised:
        mergekit_ext.merge_models(
            [codes, {name: t + 1 for name, t in codes.items()}], "linear", weight=1
        )
    (problem,) = raised.value.problems
    assert problem.where == "models[0], models[1]"


def test_a_model_may_not_take_the_name_of_the_base() -> None:
    with pytest.raises(ConfigError, match="a model called 'base' beside `base`"):
        mergekit_ext.merge_models({"base": Counted(), "a": Counted()}, "nan", base=Counted())


def test_an_input_that_is_not_finite_is_named(live: Any) -> None:
    broken = {name: tensor.clone() for name, tensor in live[1].state_dict().items()}
    broken["model.norm.weight"][0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model.norm.weight of model bad"):
        mergekit_ext.merge_models({"bad": broken}, "nan", base=live[0])


def test_warnings_come_once(live: Any) -> None:
    with pytest.warns(OvershootWarning, match="in place of 5") as found:
        mergekit_ext.merge_models(live[1:], "nan", base=live[0], scale=5)
    assert [each.filename for each in found] == [__file__]  # where the user called
    with pytest.warns(TwoModelsWarning) as found:
        mergekit_ext.merge_models(live[1:3], "lore", mu_relative=0.1)
    assert len(found) == 1
