"""Snapshots of the adapter that is trained, merged as `peft_merge` merges saved ones."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError, NonFiniteError
from peft_merge import run_config
from tests.callbacks.small import MODULE, change, llama, lora_model, same, spread, train
from tests.models import state


@pytest.mark.parametrize("on", ["step", "save"])
@pytest.mark.parametrize("method", ["ties", "nan", "lore", "tsv_m", "pcb"])
def test_a_merge_is_that_of_the_saved_adapters(tmp_path, method, on):
    parameters = {"ties": {"density": 0.5}, "lore": {"mu_relative": 0.2}}.get(method, {})
    model = lora_model()
    options = {"keep": 2, "parameters": parameters, "adapter_options": {"rank": 4}, "on": on}
    callback = MergeCheckpoints(method, **options)
    callback.on_train_begin(0, model)
    for step in (1, 2, 3):
        spread(model, 0.2, seed=step)
        model.save_pretrained(tmp_path / f"s{step}")
        callback.on_step_end(step, model)
        callback.on_save(step, tmp_path / f"s{step}")
    assert callback.steps == (2, 3)
    models = [{"model": str(tmp_path / f"s{step}")} for step in (2, 3)]
    own = {"nan": {"scale": "auto"}, "lore": {"lambda": "auto"}, "pcb": {"lambda": "auto"}}
    parameters = {**own.get(method, {}), **parameters}
    content = {"merge_method": method, "models": models, "parameters": parameters, "rank": 4}
    run_config(content, tmp_path / "out")
    merged = callback.merge()
    same(state(merged.path), state(tmp_path / "out"), rtol=0, atol=0)
    assert (merged.path / "merge_report.json").is_file()


def test_changes_are_merged_and_not_factors(tmp_path):
    model, changes = lora_model(), []
    callback = MergeCheckpoints("linear", keep=3, where=tmp_path, load=True)
    train(model, [callback], steps=5, amount=0.2, seen=lambda: changes.append(change(model)))
    callback.on_train_end(5, model)
    assert callback.result.loaded and model.active_adapters == ["merged"]
    expected = torch.stack(changes[2:]).mean(0)
    torch.testing.assert_close(change(model), expected, rtol=1e-4, atol=1e-5)
    saved = PeftModel.from_pretrained(llama(), callback.result.path)
    torch.testing.assert_close(change(saved), expected, rtol=1e-4, atol=1e-5)
    files = [state(place) for place in sorted(tmp_path.glob("step-*"))]
    key = f"base_model.model.{MODULE}.lora_{{}}.weight"
    a, b = (torch.stack([f[key.format(x)] for f in files]).mean(0).double() for x in "AB")
    assert (1.5 * (b @ a) - expected).norm() > 0.1 * expected.norm()  # that must not come out


def test_merging_again_replaces_what_was_loaded_and_goes_on_with_the_trained_one():
    model, changes = lora_model(), []
    callback = MergeCheckpoints("average", load=True, evaluate=lambda model, task: 0.0)
    train(model, [callback], steps=2, amount=0.2, seen=lambda: changes.append(change(model)))
    callback.merge(model=model)
    callback.merge(model=model)
    assert sorted(model.peft_config) == ["default", "merged"]
    expected = torch.stack(changes).mean(0)
    torch.testing.assert_close(change(model), expected, rtol=1e-4, atol=1e-5)
    callback.on_step_end(3, model)  # the trained one still
    changes.append(changes[-1])
    callback.merge(model=model)
    torch.testing.assert_close(change(model), torch.stack(changes).mean(0), rtol=1e-4, atol=1e-5)


def test_evaluating_leaves_the_model_as_it_was():
    model = lora_model()
    model.train()
    frozen = model.base_model.model.get_submodule(MODULE).lora_A["default"].weight
    frozen.requires_grad_(False)  # which PEFT would switch on again
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    seen, changes = [], []

    def score(model, task):
        seen.append(float(change(model).norm()))
        assert not model.training
        return {"norm": seen[-1]}

    callback = MergeCheckpoints("average", evaluate=score, load=True, keep_better=True)
    train(model, [callback], steps=4, amount=0.2, seen=lambda: changes.append(change(model)))
    callback.on_train_end(4, model)
    assert seen[0] == pytest.approx(float(changes[-1].norm()), rel=1e-5)
    assert seen[1] == pytest.approx(float(torch.stack(changes).mean(0).norm()), rel=1e-4)
    assert not callback.result.loaded and list(model.peft_config) == ["default"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    torch.testing.assert_close(change(model), changes[-1])


@pytest.mark.parametrize("others", [(), ("default",)])
def test_saved_checkpoints_of_an_adapter_with_a_name_of_its_own(tmp_path, others):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "mine")
    for other in others:
        model.add_adapter(other, LoraConfig(r=3, target_modules=["v_proj"]))
    live = MergeCheckpoints("linear", on="save")
    named = MergeCheckpoints("linear", on="save", adapter="mine")
    live.on_train_begin(0, model)
    for step in (1, 2):
        spread(model, 0.2, seed=step)
        model.save_pretrained(tmp_path / f"c{step}")
        live.on_save(step, tmp_path / f"c{step}")
        named.on_save(step, tmp_path / f"c{step}")
    found = [state(callback.merge().path) for callback in (live, named)]
    assert all("q_proj" in name for name in found[0])
    same(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"base": "initial"}, "changes of the model's frozen weights"),
        ("model_stock", {}, r"merge_method: found 'model_stock'"),
        ("flexmerge", {}, r"a method that makes one adapter|target_size"),
        ("ties", {"parameters": {"densty": 1}, "adapter_options": {"rank": 0}}, "2 problems"),
        ("average", {"adapter": "other"}, "adapter: found 'other'; expected one of default"),
    ],
)
def test_what_does_not_fit_adapters_is_an_error_before_training(method, options, message):
    with pytest.raises(ConfigError, match=message):
        MergeCheckpoints(method, **options).on_train_begin(0, lora_model())


def test_models_that_do_not_fit_are_an_error_before_training():
    callback = MergeCheckpoints("average")
    with pytest.raises(ConfigError, match="DoRA"):
        callback.on_train_begin(0, lora_model(use_dora=True))
    model = lora_model()
    model.add_adapter("merged", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="an adapter called 'merged'"):
        callback.on_train_begin(0, model)
    with pytest.raises(ConfigError, match="with a model that has none"):
        MergeCheckpoints("average", adapter_options={"rank": 2}).on_train_begin(0, llama())


@pytest.mark.parametrize("method", ["average", "linear"])
def test_a_factor_that_is_not_finite_is_named(method):
    model = lora_model()
    callback = MergeCheckpoints(method)
    callback.on_train_begin(0, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"lora_B\.weight of model at step 1"):
        callback.on_step_end(1, model)
