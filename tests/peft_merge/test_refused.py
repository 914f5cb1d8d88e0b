"""What cannot be merged exactly is refused, with the reason."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftType,
    PromptTuningConfig,
    get_peft_model,
)

from mergekit_ext.errors import ConfigError
from peft_merge.io.read import adapters_of, load_adapter
from peft_merge.io.unsupported import KNOWN, REFUSALS, field_problems
from tests.peft_merge.edit import change_config
from tests.peft_merge.models import KINDS, base, reloaded

# A field, a value that sets it, and words of the reason.
CASES: list[tuple[str, Any, str]] = [
    ("use_dora", True, "magnitudes"),
    ("kasa_config", {"beta": 1e-4, "gamma": 1e-3}, "truncates the base"),
    ("alora_invocation_tokens", [1, 2], "invocation tokens"),
    ("use_qalora", True, "pools"),
    ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
    ("arrow_config", {"top_k": 2}, "routes"),
    ("monteclora_config", {"num_samples": 2}, "samples"),
    ("trainable_token_indices", [3], "rows of the embedding"),
    ("megatron_config", {"hidden_size": 8}, "Megatron"),
    ("init_lora_weights", "pissa", "principal components"),
    ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "olora", "QR"),
    ("init_lora_weights", "OLoRA", "QR"),
    ("init_lora_weights", "corda", "covariances"),
    ("init_lora_weights", "loftq", "quantises"),
    ("init_lora_weights", "lora_ga", "subtracted"),
    ("init_lora_weights", "brand_new", "not known"),
    ("a_field_of_tomorrow", {"on": True}, "newer PEFT"),
    *(("peft_type", kind.value, "LORA or IA3") for kind in PeftType if kind.value not in KNOWN),
    ("peft_type", "LORAA", "LORA or IA3"),
    ("peft_type", ["LORA"], "LORA or IA3"),
    ("peft_type", None, "LORA or IA3"),
]


@pytest.mark.parametrize(
    ("field", "value", "reason"), CASES, ids=lambda value: str(value)[:24].replace("/", "_")
)
def test_each_is_refused_with_its_reason(field, value, reason, adapter_folder):
    folder = change_config(adapter_folder("plain"), **{field: value})
    with pytest.raises(ConfigError, match=reason) as raised:
        load_adapter(folder)
    (problem,) = raised.value.problems
    assert field in problem.where and problem.remedy


def test_every_refusal_is_tried_above():
    assert set(REFUSALS) <= {field for field, _, _ in CASES}


def test_all_reasons_come_at_once(adapter_folder):
    folder = change_config(
        adapter_folder("plain"), use_dora=True, init_lora_weights="pissa", r="four"
    )
    with pytest.raises(ConfigError) as raised:
        load_adapter(folder)
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_not_set_does_not_matter(value, adapter_folder):
    load_adapter(change_config(adapter_folder("plain"), a_field_of_tomorrow=value))


def test_fields_of_other_trainers_do_not_matter(adapter_folder):
    fields = {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}
    load_adapter(change_config(adapter_folder("plain"), **fields))


def test_every_field_of_the_installed_peft_is_known():
    assert set(LoraConfig().to_dict()) <= KNOWN["LORA"]
    assert set(IA3Config().to_dict()) <= KNOWN["IA3"]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("ia3", "bias", "all"),
        ("ia3", "target_parameters", ["q_proj.weight"]),
        ("ia3", "layer_replication", [[0, 1]]),
        ("ia3", "use_dora", True),
        ("plain", "feedforward_modules", ["q_proj"]),
    ],
)
def test_a_field_of_the_other_kind_is_refused(kind, field, value, adapter_folder):
    folder = change_config(adapter_folder(kind), **{field: value})
    with pytest.raises(ConfigError, match="another method") as raised:
        load_adapter(folder)
    (problem,) = raised.value.problems
    assert problem.where == f"{folder / 'adapter_config.json'}: {field}"


@pytest.mark.parametrize("config", [LoraConfig(), IA3Config()], ids=["LORA", "IA3"])
def test_a_default_configuration_is_accepted(config):
    assert not list(field_problems(json.loads(json.dumps(config.to_dict())), "here"))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        LoraConfig(target_modules=["q_proj"], kasa_config={"beta": 1e-4}),
        LoraConfig(target_modules=["q_proj"], monteclora_config={"num_samples": 2}),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]),
        LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"),
        LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: str(config.peft_type.value),
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_itself_makes_of_them_is_refused(config, tmp_path):
    model = get_peft_model(base(KINDS["plain"]), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError):
        load_adapter(tmp_path)
    with pytest.raises(ConfigError):
        adapters_of(model, ["default"])


@pytest.mark.filterwarnings("ignore")
def test_a_dora_whose_configuration_hides_it_is_seen_by_its_tensors(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], use_dora=True)
    get_peft_model(base(KINDS["plain"]), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lora_magnitude_vector"):
        load_adapter(change_config(tmp_path, use_dora=False))


@pytest.mark.filterwarnings("ignore")
def test_a_converted_pissa_is_an_ordinary_lora(tmp_path):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(base(KINDS["plain"]), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter = load_adapter(tmp_path / "end")
    assert {info.rank for info in adapter.infos.values()} == {4}


@pytest.mark.parametrize(
    ("initialisation", "changes"),
    [("pissa", True), ("olora", True), ("gaussian", False), ("orthogonal", False), ("mica", False)],
)
@pytest.mark.filterwarnings("ignore")
def test_which_initialisations_change_the_base_when_they_are_loaded(
    initialisation, changes, tmp_path
):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=initialisation)
    get_peft_model(base(KINDS["plain"]), config).save_pretrained(tmp_path)
    loaded = reloaded(KINDS["plain"], tmp_path).base_model.model.model.layers[0].self_attn.q_proj
    original = base(KINDS["plain"]).model.layers[0].self_attn.q_proj
    assert torch.equal(loaded.base_layer.weight, original.weight) != changes


@pytest.mark.parametrize(
    "value",
    [
        {"target_modules": [1] * 50_000},
        {"layers_to_transform": ["a"] * 50_000},
        {"layer_replication": [["a", "b"]] * 50_000},
        {"rank_pattern": dict.fromkeys(map(str, range(50_000)), "a")},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_hostile_list_is_one_problem_and_takes_little_memory(value):
    tracemalloc.start()
    try:
        (problem,) = field_problems({"peft_type": "LORA", **value}, "a")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000  # 1.2 kB for each would be 60 MB
    finally:
        tracemalloc.stop()
    assert next(iter(value)) in problem.where
