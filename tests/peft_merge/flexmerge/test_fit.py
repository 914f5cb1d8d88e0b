"""A base that the tasks do not fit is refused, and is what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification, LlamaForCausalLM

from mergekit_ext.errors import ConfigError
from peft_merge import load_tasks
from peft_merge.flexmerge import load
from peft_merge.merge import merge_adapters
from tests.peft_merge.models import KINDS, answer, base, saved

TASKS = ["t0", "t1"]


def written(kind, place):
    sources = [saved(KINDS[kind], place / name, i) for i, name in enumerate(TASKS)]
    merge_adapters(sources, "flexmerge", parameters={"target_size": 2}).save(place / "out")
    return place / "out"


def state(model):
    """All that loading could change."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    tensors = [(name, p.requires_grad, p.clone()) for name, p in model.named_parameters()]
    return modules, tensors, sorted(vars(model))


def same(left, right):
    pairs = zip(left[1], right[1], strict=True)
    tensors = all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)
    return left[0] == right[0] and left[2] == right[2] and tensors


def refused(model, folder, **options):
    before = state(model)
    with pytest.raises(ConfigError) as raised:
        load_tasks(model, folder, **options)
    assert same(before, state(model))
    return str(raised.value)


def resized(kind, **fields):
    config = copy.deepcopy(base(KINDS[kind]).config)
    for name, value in fields.items():
        setattr(config, name, value)
    model = BertForSequenceClassification if config.model_type == "bert" else LlamaForCausalLM
    return model(config).train()


@pytest.mark.parametrize("kind", ["plain", "ia3", "embedding"])
def test_a_base_of_another_size(kind, tmp_path):
    folder = written(kind, tmp_path)
    text = refused(resized(kind, hidden_size=32, intermediate_size=40), folder)
    assert "adapter t0: found tensors of another shape: model." in text


def test_a_base_with_fewer_layers_or_of_another_class(tmp_path):
    folder = written("plain", tmp_path)
    assert "the model lacks: model.layers.1.self_attn.q_proj.lora_A.weight" in refused(
        resized("plain", num_hidden_layers=1), folder
    )
    assert "a model that PEFT does not take" in refused(base(KINDS["lora_bias"]), folder)


def test_a_head_of_another_size(tmp_path):
    folder = written("modules_to_save", tmp_path)
    text = refused(resized("modules_to_save", num_labels=5), folder)
    assert "classifier.bias ([3], in the model [5])" in text


def test_feedforward_vectors_of_a_turned_layer(tmp_path):
    folder = written("ia3", tmp_path)
    model = base(KINDS["ia3"])
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(16, 24, bias=False)
    assert "another shape: model.layers.0.mlp.down_proj.ia3_l (" in refused(model, folder)


def test_what_is_no_base(tmp_path):
    folder = written("plain", tmp_path)
    with pytest.raises(TypeError, match="base_model: found str; expected a model"):
        load_tasks("org/base", folder)
    model = PeftModel.from_pretrained(base(KINDS["plain"]), folder / "t0")
    for found in (model, model.base_model.model):
        assert "has adapters already" in refused(found, folder)
    assert answer(KINDS["plain"], load_tasks(model.unload(), folder)).isfinite().all()
    with pytest.raises(ConfigError, match="parameters that are offloaded"):
        load_tasks(base(KINDS["plain"]).to("meta"), folder)


def test_whatever_else_fails_leaves_the_base(tmp_path, monkeypatch):
    folder = written("plain", tmp_path)

    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(load, "add_adapter", fail)
    assert "does not take (RuntimeError: out of luck)" in refused(resized("plain"), folder)
    monkeypatch.undo()
    model = base(KINDS["plain"])
    before = state(model)
    monkeypatch.setattr(load, "fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_tasks(model, folder)
    assert same(before, state(model))


def test_a_batch_of_several_tasks_is_refused_for_ia3(tmp_path):
    model = load_tasks(base(KINDS["ia3"]), written("ia3", tmp_path))
    inputs = KINDS["ia3"].inputs()
    with pytest.raises(ValueError, match="no batches of several tasks"):
        model(**inputs, adapter_names=TASKS)
    with pytest.raises(ValueError, match="no batches of several tasks"):
        model.generate(**inputs, adapter_names=TASKS, max_new_tokens=1)
    assert answer(KINDS["ia3"], model).isfinite().all()
    model.generate(**inputs, max_new_tokens=1)
