"""`average` and `ema`: means in memory of any module, and of adapters as products."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, get_peft_model

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError
from tests.callbacks.small import Net, change, llama, lora_model, mean, same, train
from tests.models import state

TIED = "third.weight"  # the second name of second.weight
COUNT = "norm.num_batches_tracked"


def weighted(states, weights):
    total = sum(weights)
    return {
        k: sum(w / total * s[k].double() for w, s in zip(weights, states, strict=True)).float()
        for k in states[0]
    }


def raw(steps, decay):
    return [decay ** (steps - 1)] + [
        (1 - decay) * decay ** (steps - i) for i in range(2, steps + 1)
    ]


@pytest.mark.parametrize(
    ("method", "parameters", "weights"),
    [
        ("average", {}, [1] * 7),
        ("ema", {"decay": 0.7}, [0.7 ** (7 - i) for i in range(1, 8)]),
        ("ema", {"decay": 0.7, "bias_correction": False}, raw(7, 0.7)),
    ],
)
def test_the_weighted_mean_of_all_snapshots(method, parameters, weights):
    model = Net()
    callback = MergeCheckpoints(method, parameters=parameters, load=True)
    states = train(model, [callback], steps=7)
    counter = model.norm.num_batches_tracked
    counter += 3  # integers are those of the last snapshot
    callback.on_step_end(7, model)  # is in the mean already
    callback.on_train_end(7, model)
    expected = weighted(states, weights)
    expected["norm.num_batches_tracked"] = torch.tensor(0)
    found = state(callback.result.path)
    assert callback.result.steps == tuple(range(1, 8)) and TIED not in found
    same(dict(model.state_dict()), {**found, TIED: found["second.weight"]}, rtol=0, atol=0)
    same(dict(model.state_dict()), expected, rtol=1e-5, atol=1e-6)
    assert model.third.weight is model.second.weight


def test_half_precision_is_averaged_in_float32_and_returned_in_its_own_dtype():
    model = llama(tied=True, dtype=torch.bfloat16)
    callback = MergeCheckpoints("average", every=2)
    states = train(model, [callback], steps=9)
    result = callback.merge()
    assert result.steps == (2, 4, 6, 8)
    expected = {k: t.to(torch.bfloat16) for k, t in mean(states[1::2], states[0]).items()}
    found = state(result.path)
    same(found, {k: expected[k] for k in found}, rtol=2**-7, atol=1e-7)
    type(model).from_pretrained(result.path)


def renamed(old, new):
    def rename(module, state, prefix, *_):
        for name in [name for name in state if name.startswith(prefix + old)]:
            state[prefix + new + name.removeprefix(prefix + old)] = state.pop(name)

    return rename


def test_tensors_that_hooks_rename_are_averaged():
    model = Net()
    for ours, saved in ("second", "renamed"), ("first", "other"):
        model.register_state_dict_post_hook(renamed(ours, saved))
        model.register_load_state_dict_pre_hook(renamed(saved, ours))
    callback = MergeCheckpoints("average", load=True)
    states = train(model, [callback], steps=3)
    callback.on_train_end(3, model)
    assert "renamed.weight" in states[0]
    expected = weighted(states, [1] * 3) | {COUNT: states[-1][COUNT]}
    same(dict(model.state_dict()), expected, rtol=1e-5, atol=1e-6)
    assert model.third.weight is model.second.weight


def test_a_mean_is_one_copy_and_cannot_go_back():
    model = torch.nn.Linear(256, 256)
    callback = MergeCheckpoints("ema")
    for step in range(1, 6):
        callback.on_step_end(step, model)
    tensors = callback.state_dict()["mean"]["tensors"].values()
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 4 * (256 * 256 + 256)
    with pytest.raises(ConfigError, match="5 or later: `ema` keeps no snapshots"):
        callback.merge(4)


def test_a_model_whose_tensors_change_is_an_error_in_that_step():
    model = Net()
    callback = MergeCheckpoints("average")
    train(model, [callback], steps=2)
    before = state(callback.merge().path)
    model.scale = torch.nn.Parameter(torch.ones(2))
    model.more = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match=r"found more, scale, .*tensors of the snapshots before"):
        callback.on_step_end(3, model)
    assert callback.steps == (1, 2)
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    del model.more
    same(state(callback.merge().path), before)


@pytest.mark.parametrize(
    ("method", "options", "weights"),
    [
        ("average", {"adapter_options": {"rank": "lossless"}}, [1] * 6),
        ("ema", {"parameters": {"decay": 0.5}}, [0.5 ** (6 - i) for i in range(1, 7)]),
    ],
)
def test_means_of_adapters_are_means_of_products(method, options, weights):
    model = lora_model(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].to(torch.bfloat16)
    callback, changes = MergeCheckpoints(method, load=True, **options), []
    heads = train(
        model, [callback], steps=6, amount=0.2, seen=lambda: changes.append(change(model))
    )
    kept = callback.state_dict()["mean"]["tensors"]
    assert {tensor.dtype for name, tensor in kept.items() if "lora" in name} == {torch.float64}
    callback.on_train_end(6, model)
    wanted = sum(w * found for w, found in zip(weights, changes, strict=True)) / sum(weights)
    torch.testing.assert_close(change(model), wanted, rtol=1e-4, atol=1e-5)
    found = state(callback.result.path)
    head = found.pop("base_model.model.lm_head.weight")
    key = "base_model.model.lm_head.modules_to_save.default.weight"
    expected = weighted([{"head": state[key]} for state in heads], weights)["head"]
    torch.testing.assert_close(head, expected.to(torch.bfloat16), rtol=2**-7, atol=1e-4)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_the_dtype_of_an_adapter_can_be_chosen():
    callback = MergeCheckpoints("average", adapter_options={"dtype": "float16", "rank": 3})
    train(lora_model(), [callback], steps=2)
    found = state(callback.merge().path)
    assert {t.dtype for t in found.values()} == {torch.float16}
    assert {t.shape[0] for name, t in found.items() if "lora_A" in name} == {3}


@pytest.mark.parametrize("method", ["average", "linear"])
def test_ia3_and_heads(method):
    config = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = get_peft_model(llama(), IA3Config(**config, modules_to_save=["lm_head"]))
    callback = MergeCheckpoints(method, keep=3)
    states = train(model, [callback], steps=3)
    found = {
        key.replace("ia3_l", "ia3_l.default").replace(
            "lm_head.weight", "lm_head.modules_to_save.default.weight"
        ): tensor
        for key, tensor in state(callback.merge().path).items()
    }
    assert len(found) == 3
    same(found, {k: mean(states, states[0])[k] for k in found}, rtol=1e-5, atol=1e-6)
