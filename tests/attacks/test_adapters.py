"""adapter_config.json with anything anywhere, and adapters that promise what no memory holds."""

from __future__ import annotations

import json

import pytest

from tests.attacks.readers import load_adapter, load_tasks, merge_adapters, merge_base_and_adapter

_STRANGE = {
    "null": None,
    "true": True,
    "a number": 3,
    "a float": 2.5,
    "negative": -1,
    "zero": 0,
    "a thousand million": 10**9,
    "more than 64 bits": 10**30,
    "huge": 10**4_000,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a text": "strange",
    "a path": "../../etc/passwd",
    "NUL": "a\0b",
    "half a surrogate": "\ud800",
    "a list": [1, [2], {"a": None}],
    "nested": [[[[[["q_proj"]]]]]],
    "an object": {"q_proj": {"r": 8}},
    "a list of objects": [{"q_proj": 1}],
    "an endless expression": "(a+)+$",
}
_FIELDS = (
    *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("modules_to_save", "target_parameters", "layers_to_transform", "exclude_modules"),
    *("layers_pattern", "layer_replication", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("base_model_name_or_path", "task_type", "revision", "auto_mapping", "init_lora_weights"),
    *("loftq_config", "megatron_config", "corda_config", "lora_dropout", "inference_mode"),
)


def edited(inputs, **fields):
    file = inputs / "adapter0" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("field", _FIELDS)
def test_any_value_in_any_field(field, inputs, answer):
    """What means nothing for the merge may be anything; what is refused is refused in words."""
    file = inputs / "adapter0" / "adapter_config.json"
    before = file.read_text()
    for value in _STRANGE.values():
        edited(inputs, **{field: value})
        outcome = answer(load_adapter, inputs)
        assert outcome.code == 0 or "expected" in outcome.text
        file.write_text(before)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": [8]},
        {"r": 10**9},
        {"rank_pattern": {"q_proj": 10**9}},
        {"target_modules": {"q_proj": 8}},
        {"target_modules": ["../q_proj\0"]},
        {"target_modules": "(a+)+$"},
        {"base_model_name_or_path": ["a"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("reader", [merge_adapters, merge_base_and_adapter])
def test_merges_refuse(reader, fields, inputs, refused):
    edited(inputs, **fields)
    refused(reader, inputs)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["tasks"][0].update(name="../adapter0"),
        lambda content: content["tasks"][0].update(name="/tmp"),
        lambda content: content["tasks"][0].update(name=["adapter0"]),
        lambda content: content["tasks"][0]["files"][0].update(name="../../adapter0/x"),
        lambda content: content["tasks"][0]["files"][0].update(bytes=10**30),
        lambda content: content["tasks"][0]["files"][0].update(sha256=7),
        lambda content: content["tasks"].append(content["tasks"][0]),
        lambda content: content.update(tasks=[]),
        lambda content: content.update(tasks={}),
        lambda content: content.update(blocks=[{"name": "a", "groups": [{}]}]),
        lambda content: content["blocks"][0]["groups"][0].update(similarity=[1]),
        lambda content: content["blocks"][0]["groups"][0].update(similarity=10**400),
        lambda content: content["blocks"][0]["groups"][0].update(modules=["../x", "\ud800"]),
        lambda content: content["blocks"][0]["groups"][0].update(modules=["no.such.module"]),
        lambda content: content["blocks"].append({"name": "twice", **content["blocks"][0]}),
        lambda content: content.update(kind=["lora"]),
        lambda content: content.update(kind="ia3"),
        lambda content: content.update(version=True),
    ],
)
def test_manifests_of_adapters(change, inputs, answer):
    file = inputs / "tasks" / "flexmerge.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    outcome = answer(load_tasks, inputs)
    assert outcome.code == 2, outcome
    assert "expected" in outcome.text


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_a_folder_of_tasks(name, inputs, refused):
    file = inputs / "tasks" / "adapter0" / name
    elsewhere = inputs.parent / name
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert "link" in refused(load_tasks, inputs)
