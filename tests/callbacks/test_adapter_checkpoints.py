"""Merging the snapshots of an adapter while it is trained: as products."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError, NonFiniteError
from tests.callbacks.small import llama, lora_model, spread, train

MODULE = "model.layers.0.self_attn.q_proj"


def change(model, module=MODULE):
    """What the active adapter adds to a weight, in float64."""
    layer = model.base_model.model.get_submodule(module)
    total = 0
    for name in layer.active_adapters:
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        total = total + layer.scaling[name] * (b @ a)
    return total.detach()


def changes_while_training(model, callbacks, steps):
    found = []
    for callback in callbacks:
        callback.on_train_begin(0, model)
    for step in range(1, steps + 1):
        spread(model, 0.2, seed=step)
        found.append(change(model))
        for callback in callbacks:
            callback.on_step_end(step, model)
    return found


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_adapters_are_merged_as_products(tmp_path, where):
    model = lora_model()
    place = "memory" if where == "memory" else tmp_path / "snapshots"
    callback = MergeCheckpoints("linear", keep=3, where=place, load=True)
    found = changes_while_training(model, [callback], 5)
    factors = torch.stack(found[2:]).mean(0)
    callback.on_train_end(5, model)
    assert callback.result.loaded and callback.result.steps == (3, 4, 5)
    assert model.active_adapters == ["merged"]
    torch.testing.assert_close(change(model), factors, rtol=1e-4, atol=1e-5)
    # The mean of the factors is something else: that is what must not come out.
    if where == "folder":
        from safetensors.torch import load_file

        files = [load_file(p / "adapter_model.safetensors") for p in sorted(place.iterdir())]
        key = f"base_model.model.{MODULE}.lora_{{}}.weight"
        a, b = (torch.stack([f[key.format(x)] for f in files]).mean(0).double() for x in "AB")
        assert (1.5 * (b @ a) - factors).norm() > 0.1 * factors.norm()
        assert len(files) == 3
        PeftModel.from_pretrained(llama(), sorted(place.iterdir())[0])


def test_running_means_of_adapters_are_means_of_products_and_keep_one_adapter():
    model = lora_model()
    average, ema = (
        MergeCheckpoints("average", adapter_options={"rank": "lossless"}),
        MergeCheckpoints("ema", parameters={"decay": 0.5}),
    )
    found = changes_while_training(model, [average, ema], 6)
    weights = torch.tensor([0.5 ** (6 - i) for i in range(1, 7)], dtype=torch.float64)
    weights /= weights.sum()
    expected = [torch.stack(found).mean(0), sum(w * f for w, f in zip(weights, found, strict=True))]
    for callback, wanted in zip([average, ema], expected, strict=True):
        kept = callback.state_dict()["collected"]
        assert set(kept) == {"steps", "mean", "dtypes"}
        for name, tensor in kept["mean"]["tensors"].items():
            assert tensor.dtype == torch.float64, name
        merged = callback.merge()
        key = f"base_model.model.{MODULE}.lora_{{}}.weight"
        a, b = (merged.weights.tensors[key.format(x)] for x in "AB")
        assert a.dtype == torch.float32
        scale = merged.weights.config["lora_alpha"] / merged.weights.config["r"]
        torch.testing.assert_close(scale * b.double() @ a.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "nan", "lore", "tsv_m", "pcb"])
def test_other_methods_agree_with_merge_adapters_on_saved_adapters(tmp_path, method):
    from peft_merge import merge_adapters
    from peft_merge.io import state_dict

    parameters = {"ties": {"density": 0.5}, "lore": {"mu_relative": 0.2}}.get(method, {})
    model = lora_model()
    callback = MergeCheckpoints(method, keep=2, parameters=parameters, adapter_options={"rank": 4})
    callback.on_train_begin(0, model)
    for step in (1, 2, 3):
        spread(model, 0.2, seed=step)
        model.save_pretrained(tmp_path / f"s{step}")
        callback.on_step_end(step, model)
    folders = [tmp_path / "s2", tmp_path / "s3"]
    expected = state_dict(merge_adapters(folders, method, parameters=parameters, rank=4).adapter)
    found = callback.merge()
    assert found.report["modules"]
    assert set(found.weights.tensors) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found.weights.tensors[name], tensor)


def test_lists_are_for_snapshots_and_not_for_layers():
    def found(**options):
        callback = MergeCheckpoints("linear", keep=3, **options)
        changes_while_training(lora_model(), [callback], 3)
        return callback.merge().weights

    weights = found(parameters={"weight": [1.0, 0.0, 0.0]}, adapter_options={"rank": "lossless"})
    model = lora_model()
    (first,) = changes_while_training(model, [], 1)
    key = f"base_model.model.{MODULE}.lora_{{}}.weight"
    a, b = (weights.tensors[key.format(x)].double() for x in "AB")
    scale = weights.config["lora_alpha"] / weights.config["r"]
    torch.testing.assert_close(scale * b @ a, first, rtol=1e-4, atol=1e-5)
    callback = MergeCheckpoints("ties", keep=3, parameters={"density": [0.5, 2.0], "weight": [1]})
    with pytest.raises(ConfigError) as caught:
        callback.on_train_begin(0, lora_model())
    assert "density: found 2 values; expected one value for all snapshots" in str(caught.value)
    assert "weight: found 1 values" in str(caught.value)
    callback = MergeCheckpoints("ties", keep=2, parameters={"density": [0.5, 2.0]})
    with pytest.raises(ConfigError, match=r"parameters\.density: found 2"):
        callback.on_train_begin(0, lora_model())


def test_running_means_return_the_dtype_of_each_tensor():
    model = lora_model(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].to(torch.bfloat16)
    average = MergeCheckpoints("average")
    changes_while_training(model, [average], 2)
    found = {name: tensor.dtype for name, tensor in average.merge().weights.tensors.items()}
    assert found.pop("base_model.model.lm_head.weight") == head.weight.dtype == torch.bfloat16
    assert set(found.values()) == {torch.float32}
    cast = MergeCheckpoints("average", adapter_options={"dtype": "float16"})
    changes_while_training(lora_model(), [cast], 2)
    assert {t.dtype for t in cast.merge().weights.tensors.values()} == {torch.float16}


def test_evaluating_leaves_the_model_as_it_was():
    model = lora_model()
    model.train()
    frozen = model.base_model.model.get_submodule(MODULE).lora_A["default"].weight
    frozen.requires_grad_(False)  # which PEFT would switch on again
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def score(model, task):
        seen.append(float(change(model).norm()))
        assert not model.training
        return {"norm": seen[-1]}

    callback = MergeCheckpoints("average", evaluate=score, load=True, keep_better=True)
    found = changes_while_training(model, [callback], 4)
    callback.on_train_end(4, model)
    assert seen[0] == pytest.approx(float(found[-1].norm()), rel=1e-5)
    assert seen[1] == pytest.approx(float(torch.stack(found).mean(0).norm()), rel=1e-4)
    assert not callback.result.loaded and list(model.peft_config) == ["default"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    torch.testing.assert_close(change(model), found[-1])


def test_merging_and_loading_again_replaces_what_was_loaded():
    model = lora_model()
    callback = MergeCheckpoints("average", load=True, evaluate=lambda model, task: 0.0)
    found = changes_while_training(model, [callback], 2)
    callback.merge(model=model)
    callback.merge(model=model)
    assert sorted(model.peft_config) == ["default", "merged"]
    torch.testing.assert_close(change(model), torch.stack(found).mean(0), rtol=1e-4, atol=1e-5)
    callback.on_step_end(3, model)  # of the trained adapter still
    assert callback.steps == (1, 2, 3)


def test_ia3_and_heads():
    model = get_peft_model(
        llama(),
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            modules_to_save=["lm_head"],
        ),
    )
    callbacks = [MergeCheckpoints(m, keep=3) for m in ("average", "linear")]
    states = train(model, callbacks, steps=3)
    for callback in callbacks:
        merged = callback.merge().weights.tensors
        for key, tensor in merged.items():
            name = key.replace("ia3_l", "ia3_l.default").replace(
                "lm_head.weight", "lm_head.modules_to_save.default.weight"
            )
            expected = torch.stack([s[name] for s in states]).mean(0)
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
        assert len(merged) == 3


def test_saved_checkpoints_of_adapters_and_the_result_as_a_folder(tmp_path):
    model = lora_model()
    callback = MergeCheckpoints("linear", on="save", keep=2)
    found = []
    for step in (1, 2, 3):
        spread(model, 0.2, seed=step)
        found.append(change(model))
        model.save_pretrained(tmp_path / f"c{step}")
        callback.on_save(step, tmp_path / f"c{step}")
    callback.merge().save(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "merged")
    expected = torch.stack(found[1:]).mean(0)
    torch.testing.assert_close(change(loaded), expected, rtol=1e-4, atol=1e-5)


def test_saved_checkpoints_of_an_adapter_with_a_name_of_its_own(tmp_path):
    def trained(*others):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "mine")
        for other in others:
            model.add_adapter(other, LoraConfig(r=3, target_modules=["v_proj"]))
        return model

    for others in ((), ("default",)):
        model = trained(*others)
        live = MergeCheckpoints("linear", on="save")
        named = MergeCheckpoints("linear", on="save", adapter="mine")
        live.on_train_begin(0, model)
        for step in (1, 2):
            spread(model, 0.2, seed=step)
            folder = tmp_path / f"{len(others)}-{step}"
            model.save_pretrained(folder)
            live.on_save(step, folder)
            named.on_save(step, folder)
        for callback in (live, named):
            merged = callback.merge().weights
            assert set(merged.config["target_modules"]) == {"q_proj"}
    with pytest.raises(ConfigError, match=r"only adapters of other names: mine; .* Give `adapter`"):
        MergeCheckpoints("linear", on="save").on_save(1, tmp_path / "0-1")


def test_what_does_not_fit_adapters_is_said_before_training():
    with pytest.raises(ConfigError, match="changes of the model's frozen weights"):
        MergeCheckpoints("ties", base="initial").on_train_begin(0, lora_model())
    with pytest.raises(ConfigError, match=r"'model_stock'.*docs/adapters\.md"):
        MergeCheckpoints("model_stock").on_train_begin(0, lora_model())
    with pytest.raises(ConfigError) as caught:
        MergeCheckpoints(
            "ties", parameters={"densty": 1, "lambda": "x"}, adapter_options={"rank": 0}
        ).on_train_begin(0, lora_model())
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match=r"adapter_options\.seed"):
        MergeCheckpoints("ties", adapter_options={"seed": 1}).on_train_begin(0, lora_model())
    with pytest.raises(ConfigError, match="DoRA"):
        MergeCheckpoints("average").on_train_begin(0, lora_model(use_dora=True))
    model = lora_model()
    model.add_adapter("merged", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="an adapter called 'merged'"):
        MergeCheckpoints("average").on_train_begin(0, model)
    with pytest.raises(ConfigError, match="adapter: found 'other'; expected one of default"):
        MergeCheckpoints("average", adapter="other").on_train_begin(0, lora_model())
    with pytest.raises(ConfigError, match="with a model that has none"):
        MergeCheckpoints("average", adapter_options={"rank": 2}).on_train_begin(0, llama())


def test_a_factor_that_is_not_finite_is_named():
    model = lora_model()
    callback = MergeCheckpoints("average")
    callback.on_train_begin(0, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"lora_B\.weight of model at step 1"):
        callback.on_step_end(1, model)
