"""Snapshots of whole models, merged while training: as the ordinary merge of the same folders."""

from __future__ import annotations

import copy
import json
import random
import re

import numpy as np
import pytest
import torch
import yaml
from mergekit.options import MergeOptions
from transformers import LlamaForCausalLM

import mergekit_ext
from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError, MergeWarning, NonFiniteError
from tests.callbacks.small import Net, llama, lora_model, mean, same, spread, train
from tests.models import state

OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("lore", {"mu_relative": 0.2}),
        ("nan_ties", {"density": 0.5, "granularity": "model"}),
        ("task_arithmetic", {"weight": 0.5}),
        ("dare_ties", {"density": 0.5}),
    ],
)
def test_a_merge_is_that_of_the_saved_folders(tmp_path, method, parameters):
    model, initial = llama(tied=True), llama(tied=True)
    callback = MergeCheckpoints(
        method, keep=3, every=2, where=tmp_path / "run", parameters=parameters, seed=3
    )
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    train(model, [callback], steps=9)
    merged = callback.merge()
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())
    assert merged.steps == callback.steps == (4, 6, 8)

    own = {"lore": {"lambda": "auto"}, "nan_ties": {"scale": "auto"}}.get(method, {"weight": 1.0})
    content = {"merge_method": method, "parameters": {**own, **parameters}}
    initial.save_pretrained(tmp_path / "base")
    content["models"] = []
    for step in range(1, 9):
        spread(initial, 0.1, seed=step)
        if step in merged.steps:
            initial.save_pretrained(tmp_path / f"s{step}")
            content["models"].append({"model": str(tmp_path / f"s{step}")})
    if method != "lore":
        content["base_model"] = str(tmp_path / "base")
    options = OPTIONS.model_copy(update={"random_seed": 3})
    mergekit_ext.merge(yaml.safe_dump(content), tmp_path / "out", options)
    same(state(merged.path), state(tmp_path / "out"), rtol=0, atol=0)


def test_up_to_a_step_on_demand_and_saved_as_a_folder(tmp_path):
    model = llama(dtype=torch.bfloat16)
    callback = MergeCheckpoints("linear", keep=4)
    states = train(model, [callback], steps=5)
    early, late = callback.merge(3), callback.merge(3)
    assert early.steps == late.steps == (2, 3) and early.path != late.path
    early.save(tmp_path / "new/merged")
    expected = {k: t.to(torch.bfloat16) for k, t in mean(states[1:3], states[0]).items()}
    same(state(tmp_path / "new/merged"), expected, rtol=0, atol=0)
    LlamaForCausalLM.from_pretrained(tmp_path / "new/merged")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "new/merged"))):
        late.save(tmp_path / "new/merged")
    with pytest.raises(ConfigError, match=r"none up to step 1 \(there are those of \(2, 3, 4, 5\)"):
        callback.merge(1)


def test_disk_is_bounded_by_keep_at_every_moment(tmp_path, monkeypatch):
    model, peak, stock = llama(), [], LlamaForCausalLM.save_pretrained

    def save(self, folder, **options):
        stock(self, folder, **options)
        peak.append(len(list(tmp_path.rglob("*.safetensors"))))

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    callback = MergeCheckpoints("linear", keep=2, where=tmp_path)
    train(model, [callback], steps=5)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000005"]
    assert peak == [1, 1, 2, 2, 2, 2]  # the first is saved to be checked


def test_a_base_is_the_beginning_or_a_folder(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    given = MergeCheckpoints("ties", keep=2, base=tmp_path / "base")
    initial = MergeCheckpoints("ties", keep=2, where=tmp_path / "run")
    train(copy.deepcopy(model), [initial], steps=2)
    train(model, [given], steps=2, begin=False)
    same(state(given.merge().path), state(initial.merge().path), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"training had begun.*on_train_begin\(0, model\)"):
        train(model, [MergeCheckpoints("ties", every=100)], steps=1, begin=False)


@pytest.mark.parametrize("method", ["average", "ties"])
def test_a_second_training_begins_anew(tmp_path, method):
    callback = MergeCheckpoints(method, keep=3, where=tmp_path)
    for amount in (0.1, 0.2):
        model = llama()
        train(model, [callback], steps=2 + (amount == 0.1), amount=amount)
        first = callback.merge().path
    assert callback.steps == (1, 2) and first.name == "merged-00000002"
    fresh = MergeCheckpoints(method, keep=3)
    train(llama(), [fresh], steps=2, amount=0.2)
    same(state(callback.merge().path), state(fresh.merge().path), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["average", "linear"])
def test_what_is_not_finite_is_an_error_with_tensor_and_step(method):
    model = llama()
    callback = MergeCheckpoints(method)
    train(model, [callback], steps=2)
    with torch.no_grad():
        model.lm_head.weight[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight of model at step 3: found 1 "):
        callback.on_step_end(3, model)
    assert callback.steps == (1, 2)


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("method", ["average", "linear"])
def test_loading_and_keeping_the_better_one(method, greater):
    seen, model = [], llama()
    model.train()
    model.lm_head.eval()

    def score(model, task):
        assert not model.training and task == "toy"
        seen.append(float(model.lm_head.weight.detach().norm()))
        return {"loss": seen[-1]}

    callback = MergeCheckpoints(
        method,
        evaluate=score,
        task="toy",
        load=True,
        keep_better=True,
        greater_is_better=greater,
    )
    states = train(model, [callback], steps=4)
    callback.on_train_end(4, model)
    result, merged = callback.result, state(callback.result.path)
    assert model.training and not model.lm_head.training
    assert result.before["loss"] == pytest.approx(float(states[-1]["lm_head.weight"].norm()))
    assert result.scores["loss"] == pytest.approx(float(merged["lm_head.weight"].norm()))
    assert result.scores["loss"] < result.before["loss"]  # the mean of random steps is nearer
    assert result.loaded is not greater
    same(dict(model.state_dict()), states[-1] if greater else merged, rtol=0, atol=0)


def test_an_evaluation_that_fails_loses_neither_the_merge_nor_the_weights():
    scores, model = iter([1.0]), llama()
    callback = MergeCheckpoints("average", load=True, evaluate=lambda model, task: next(scores))
    states = train(model, [callback], steps=2)
    with pytest.raises(StopIteration):
        callback.on_train_end(2, model)
    assert callback.result.steps == (1, 2) and not callback.result.loaded
    same(dict(model.state_dict()), states[-1], rtol=0, atol=0)


def test_start_and_a_run_that_was_too_short():
    callback = MergeCheckpoints("average", start=4, every=2)
    model = Net()
    train(model, [callback], steps=7)
    assert callback.steps == (4, 6)
    callback = MergeCheckpoints("average", start=10)
    train(model, [callback], steps=3)
    with pytest.warns(MergeWarning, match="no snapshot was taken in 3 steps"):
        callback.on_train_end(3, model)


@pytest.mark.parametrize("method", ["average", "linear"])
def test_models_with_other_names_in_files_than_in_memory(tmp_path, method):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(
        ViTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    )
    model.save_pretrained(tmp_path / "model")
    assert state(tmp_path / "model").keys() - model.state_dict().keys(), "no example any more"
    callback = MergeCheckpoints(method, load=True)
    states = train(model, [callback], steps=2)
    callback.on_train_end(2, model)
    same(dict(model.state_dict()), mean(states, states[0]), rtol=1e-5, atol=1e-6)
    callback, states = MergeCheckpoints("linear", on="save", load=True), []
    for step in (1, 2):
        spread(model, 0.1, seed=step)
        model.save_pretrained(tmp_path / f"c{step}")
        states.append(copy.deepcopy(model.state_dict()))
        callback.on_save(step, tmp_path / f"c{step}")
    callback.on_train_end(2, model)
    same(dict(model.state_dict()), mean(states, states[0]), rtol=1e-5, atol=1e-6)


def test_saved_checkpoints_have_the_initial_weights_that_were_seen(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "c1")
    unseen = MergeCheckpoints("ties", on="save", keep=2)
    with pytest.raises(ConfigError, match="base: found no initial weights"):
        unseen.on_save(1, tmp_path / "c1")
    first = MergeCheckpoints("ties", on="save", keep=2, where=tmp_path / "run")
    first.on_train_begin(0, model)
    first.on_save(1, tmp_path / "c1")
    resumed = MergeCheckpoints("ties", on="save", keep=2, where=tmp_path / "run")
    resumed.load_state_dict(first.state_dict())
    resumed.on_save(2, tmp_path / "c1")
    assert resumed.steps == (1, 2)


def test_saved_checkpoints_are_merged_from_where_they_are(tmp_path):
    model = llama()
    callback = MergeCheckpoints("linear", on="save", keep=2, load=True)
    states = []
    for step in (1, 2, 3):
        spread(model, 0.1, seed=step)
        model.save_pretrained(tmp_path / f"c{step}")
        states.append(copy.deepcopy(model.state_dict()))
        callback.on_step_end(step, model)
        callback.on_save(step, tmp_path / f"c{step}")
    callback.on_train_end(3, model)
    assert callback.result.steps == (2, 3) and (tmp_path / "c1").is_dir()
    same(dict(model.state_dict()), mean(states[1:], states[0]), rtol=1e-5, atol=1e-6)
    (tmp_path / "c2").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"c2: found no such folder.*save_total_limit"):
        callback.merge()
    callback.on_save(4, tmp_path / "c1")  # c2 was the oldest, which goes anyway
    (tmp_path / "c1").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"c1: found no such folder.*save_total_limit"):
        callback.on_save(5, tmp_path / "c3")  # and not when training ends


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nan", {"base": "initial"}),
        ("nan_ties", {"parameters": {"density": 0.5}}),
        ("lore", {"parameters": {"mu_relative": 0.1}}),
        ("lore", {"base": "initial", "parameters": {"mu_relative": 0.1}}),
        ("pcb", {"parameters": {"density": 0.5}}),
    ],
)
def test_snapshots_of_one_run_do_not_add_up(method, options):
    """Methods whose own factor adds task vectors up go no further than the snapshots did."""
    model, callback = llama(), MergeCheckpoints(method, keep=4, **options)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    states = train(model, [callback], steps=4, amount=0.05)
    lengths = [
        torch.cat([(found[n] - start[n]).flatten() for n in start if n in found]).norm()
        for found in (*states, state(callback.merge().path))
    ]
    assert lengths[-1] < 1.05 * max(lengths[:-1])


def test_snapshots_of_an_adapter_do_not_add_up():
    model, callback = lora_model(), MergeCheckpoints("task_arithmetic", keep=4)
    train(model, [callback], steps=4, amount=0.05)
    report = json.loads((callback.merge().path / "merge_report.json").read_text())
    assert report["rho"]["model"]["mean"] <= 1
