"""Whole merges of real adapters: functions, reports, events, warnings."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

import peft_merge
from mergekit_ext.errors import (
    ConfigError,
    NonFiniteError,
    NotConvergedWarning,
    TwoModelsWarning,
    UniformCoefficientsWarning,
)
from mergekit_ext.events import MergeCallback
from peft_merge.io.read import load_adapter
from peft_merge.merge import merge_adapters, run_config
from peft_merge.modules import rules
from tests.peft_merge.models import KINDS, answer, reloaded, saved

# What makes each method return its only input; the others need nothing.
THRESHOLDS_OFF = {
    "lore": {"mu": 0.0},
    "pcb": {"density": 1.0, "clip": 0.0},
    "della": {"epsilon": 0.0},
    "della_linear": {"epsilon": 0.0},
    "breadcrumbs": {"gamma": 0.0},
    "breadcrumbs_ties": {"gamma": 0.0},
}


def off(method):
    return THRESHOLDS_OFF.get(method.removeprefix("nan_"), {})


def difference(merged, expected):
    """The largest relative difference of changes, over all modules of both."""
    worst = 0.0
    for module in expected:
        left = merged.load(module)
        left = left.dense() if hasattr(left, "dense") else left.double()
        scale = float(expected[module].norm()) or 1.0
        worst = max(worst, float((left - expected[module]).norm()) / scale)
    assert set(merged.infos) == set(expected)
    return worst


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_adapter_comes_back(kind, tmp_path):
    folder = saved(KINDS[kind], tmp_path / "only", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UniformCoefficientsWarning)
        merged = merge_adapters([folder], "nan")
    merged.save(tmp_path / "merged")
    model = reloaded(KINDS[kind], tmp_path / "merged")
    before, after = answer(KINDS[kind], reloaded(KINDS[kind], folder)), answer(KINDS[kind], model)
    assert float((after - before).abs().max()) < 5e-5 * float(before.abs().max())
    config = model.peft_config["default"]
    assert config.inference_mode
    if KINDS[kind].lora:
        assert config.lora_alpha == config.r and not config.use_rslora
        assert config.alpha_pattern == config.rank_pattern


# One for each way in which factors, biases, vectors and whole tensors are stored.
STORED = [
    *("patterns", "lora_bias", "modules_to_save", "embedding", "nested_parameters"),
    *("convolutions", "attention", "ia3", "ia3_modules_to_save", "ia3_convolutions"),
]


@pytest.mark.parametrize("kind", STORED)
def test_every_method_returns_the_only_adapter(kind, tmp_path):
    adapter = load_adapter(saved(KINDS[kind], tmp_path / "only", 1))
    lora = KINDS[kind].lora
    expected = {m: u.dense() if lora else u for m in adapter.infos for u in [adapter.load(m)]}
    for method in rules():
        merged = merge_adapters([adapter], method, parameters=off(method)).adapter
        assert difference(merged, expected) < 1e-5, method
        for name, load_whole in adapter.saved.items():
            assert torch.equal(merged.saved[name](), load_whole()), (method, name)
        for module in adapter.infos if lora else ():
            before, after = adapter.load(module), merged.load(module)
            if before.bias is not None:
                error = (after.scale * after.bias - before.scale * before.bias).abs().max()
                assert float(error) < 1e-5, (method, module)


def test_half_precision_comes_back(tmp_path):
    folder = saved(KINDS["patterns"], tmp_path / "only", 1, torch.bfloat16)
    adapter = load_adapter(folder)
    merged = merge_adapters([folder], "ties").adapter
    assert {info.dtype for info in merged.infos.values()} == {torch.bfloat16}
    assert difference(merged, {m: adapter.load(m).dense() for m in adapter.infos}) < 1e-2


def test_linear_is_the_weighted_mean_of_the_changes(tmp_path):
    kinds = ("plain", "patterns", "rslora", "one_layer")
    folders = [saved(KINDS[kind], tmp_path / kind, i) for i, kind in enumerate(kinds)]
    weights = [0.5, 1.0, -0.3, 2.0]
    merged = merge_adapters(folders, weights=weights)
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        adapter = load_adapter(folder)
        for module in adapter.infos:
            part = weight / sum(weights) * adapter.load(module).dense()
            total[module] = total.get(module, 0) + part
    assert difference(merged.adapter, total) < 1e-6
    assert merged.report["summary"]["largest_error"] < 1e-6
    raw = merge_adapters(folders, weights=weights, parameters={"normalize": False})
    assert difference(raw.adapter, {m: t * sum(weights) for m, t in total.items()}) < 1e-6


def test_ia3_stays_around_one(tmp_path):
    one = saved(KINDS["ia3"], tmp_path / "one", 1)
    two = saved(KINDS["ia3_attention"], tmp_path / "two", 2)
    merged = merge_adapters([one, two], "task_arithmetic", weights=[0.2, 0.3])
    adapters = [load_adapter(one), load_adapter(two)]
    expected = {}
    for module in {**adapters[0].infos, **adapters[1].infos}:
        change = sum(
            weight * (adapter.load(module).double() - 1)
            for adapter, weight in zip(adapters, (0.2, 0.3), strict=True)
            if module in adapter.infos
        )
        expected[module] = 1 + change
    assert difference(merged.adapter, expected) < 1e-6


def test_the_report_says_how_it_came_about(tmp_path):
    folders = {
        "a": saved(KINDS["plain"], tmp_path / "x", 1),
        "b": saved(KINDS["plain"], tmp_path / "y", 2, r=2),
    }
    merged = merge_adapters(
        folders, "nan_ties", weights=[1, 2], each=[{"density": 0.5}, {}], rank=3, seed=4
    )
    report = json.loads(json.dumps(merged.report, allow_nan=False))
    assert [adapter["name"] for adapter in report["adapters"]] == ["a", "b"]
    assert (report["method"], report["rank"], report["seed"]) == ("nan_ties", 3, 4)
    assert report["parameters"]["each"][0] == {"density": 0.5, "weight": 1}
    module = report["modules"]["model.layers.0.self_attn.q_proj"]
    assert module["ranks"] == {"a": 4, "b": 2}
    assert module["rank"] == 3
    assert module["weights"] == {"a": 1.0, "b": 2.0}
    assert sum(module["coefficients"].values()) == pytest.approx(1)
    assert 0 < module["error"] <= report["summary"]["largest_error"] < 1
    assert report["summary"]["largest_rank"] == 3


def test_nan_coefficients_are_those_of_the_norms(tmp_path):
    folders = [saved(KINDS["plain"], tmp_path / name, i) for i, name in enumerate("abc")]
    adapters = [load_adapter(folder) for folder in folders]
    norms = {
        module: [float(adapter.load(module).dense().norm()) for adapter in adapters]
        for module in adapters[0].infos
    }
    whole = [sum(n[i] ** 2 for n in norms.values()) ** 0.5 for i in range(3)]
    for granularity in ("tensor", "model"):
        merged = merge_adapters(
            folders, "nan", parameters={"granularity": granularity, "scale": "paper"}
        )
        expected = {}
        for module, own in norms.items():
            inverse = [1 / norm for norm in (own if granularity == "tensor" else whole)]
            factors = [1.5 * value / sum(inverse) for value in inverse]
            expected[module] = sum(
                factor * adapter.load(module).dense()
                for factor, adapter in zip(factors, adapters, strict=True)
            )
        assert difference(merged.adapter, expected) < 1e-6


def test_whole_tensors(tmp_path):
    kind = KINDS["modules_to_save"]
    folders = [saved(kind, tmp_path / name, i) for i, name in enumerate("ab")]
    one, two = (load_adapter(folder).saved["classifier.weight"]() for folder in folders)
    merged = merge_adapters(folders, weights=[1, 3], modules_to_save="average")
    torch.testing.assert_close(
        merged.adapter.saved["classifier.weight"](), (one + 3 * two) / 4, rtol=1e-6, atol=1e-7
    )
    assert merged.report["whole_tensors"]["classifier.weight"] == ["a", "b"]
    chosen = merge_adapters(folders, modules_to_save="b")
    assert torch.equal(chosen.adapter.saved["classifier.weight"](), two)
    dropped = merge_adapters(folders, modules_to_save="drop")
    assert not dropped.adapter.saved
    dropped.save(tmp_path / "dropped")
    assert reloaded(kind, tmp_path / "dropped").peft_config["default"].modules_to_save is None


def test_a_base_model_may_be_a_path_and_nothing_else(tmp_path):
    folder = saved(KINDS["plain"], tmp_path / "a", 1)
    merge_adapters([folder], base_model=Path("some/base")).save(tmp_path / "merged")
    assert load_adapter(tmp_path / "merged").config["base_model_name_or_path"] == str(
        Path("some/base")
    )
    assert "base_model: some/base" in (tmp_path / "merged" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"base_model: found 5; expected a model's name"):
        merge_adapters([folder], base_model=5)


@pytest.mark.parametrize("kind", ["plain", "ia3"])
def test_nan_in_an_input_stops_the_merge(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(KINDS[kind], tmp_path / "bad", 1)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    for method in ("linear", "nan"):
        with pytest.raises(NonFiniteError, match="bad"):
            run_config(
                {"merge_method": method, "models": [{"model": str(folder)}]}, tmp_path / "out"
            )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


class Everything(MergeCallback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return self.events.append
        return super().__getattribute__(name)


def test_events(tmp_path):
    folders = [saved(KINDS["modules_to_save"], tmp_path / name, i) for i, name in enumerate("ab")]
    seen = Everything()
    models = [{"model": str(folder)} for folder in folders]
    config = {"merge_method": "nan", "models": models, "modules_to_save": "average"}
    run_config(config, tmp_path / "out", callbacks=[seen])
    kinds = [event.handler for event in seen.events]
    modules = len(load_adapter(folders[0]).infos)
    whole = len(load_adapter(folders[0]).saved)
    assert kinds == [
        "on_merge_begin",
        "on_statistics_begin",
        *["on_tensor_measured"] * modules,
        "on_statistics_end",
        *["on_tensor_merged"] * (modules + whole),
        "on_merge_end",
    ]
    begin = seen.events[0]
    assert (begin.method, begin.models, begin.unit) == ("nan", ("a", "b"), "module")
    assert begin.tensors == modules + whole
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["plain", "ia3"])
def test_iterations_of_a_solver_are_reported(tmp_path, kind):
    folders = [saved(KINDS[kind], tmp_path / name, i) for i, name in enumerate("abc")]
    seen = Everything()
    config = {
        "merge_method": "lore",
        "parameters": {"mu_relative": 0.2, "base": "estimated"},
        "models": [{"model": str(folder)} for folder in folders],
    }
    run_config(config, tmp_path / "out", callbacks=[seen])
    counts = Counter(e.tensor for e in seen.events if e.handler == "on_solver_iteration")
    merged = {e.name: e.details for e in seen.events if e.handler == "on_tensor_merged"}
    assert counts == {module: details["iterations"] for module, details in merged.items()}


def test_a_callback_that_raises_leaves_nothing(tmp_path):
    folder = saved(KINDS["plain"], tmp_path / "a", 1)

    class Stop(MergeCallback):
        def on_tensor_merged(self, event):
            raise KeyboardInterrupt

    config = {"merge_method": "linear", "models": [{"model": str(folder)}]}
    with pytest.raises(KeyboardInterrupt):
        run_config(config, tmp_path / "out", callbacks=[Stop()])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_uniform_coefficients_are_reported(tmp_path):
    folder = saved(KINDS["plain"], tmp_path / "a", 1)
    with pytest.warns(UniformCoefficientsWarning, match="came out uniform"):
        merge_adapters({"a": folder, "b": folder}, "nan")


def test_two_adapters_of_unknown_base_are_reported(tmp_path):
    folders = [saved(KINDS["plain"], tmp_path / name, i) for i, name in enumerate("ab")]
    with pytest.warns(TwoModelsWarning):
        merge_adapters(folders, "lore", parameters={"mu_relative": 0.1, "base": "estimated"})


def test_a_solver_that_stops_early_is_reported(tmp_path):
    folders = [saved(KINDS["plain"], tmp_path / name, i) for i, name in enumerate("abc")]
    options = {"mu_relative": 0.1, "base": "estimated", "max_iterations": 1}
    with pytest.warns(NotConvergedWarning, match="4 of 4 tensors .* in 1 iterations"):
        merge_adapters(folders, "lore", parameters=options)


def test_a_merge_can_be_repeated_from_what_it_wrote(tmp_path):
    folders = [saved(KINDS["plain"], tmp_path / name, i) for i, name in enumerate("ab")]
    merged = merge_adapters(
        folders,
        "dare_ties",
        weights=[1, 0.5],
        parameters={"density": [{"filter": "q_proj", "value": 0.3}, {"value": 0.8}]},
        rank={"energy": 0.9},
        dtype=torch.bfloat16,
        seed=3,
    )
    merged.save(tmp_path / "out")
    run_config(tmp_path / "out" / "merge_config.yml", tmp_path / "again")
    first, again = (load_adapter(tmp_path / name) for name in ("out", "again"))
    assert first.infos == again.infos
    assert all(torch.equal(first.load(m).dense(), again.load(m).dense()) for m in first.infos)
    config = yaml.safe_load((tmp_path / "out" / "merge_config.yml").read_text())
    other = run_config({**config, "seed": 4}, tmp_path / "other").adapter
    assert not any(torch.equal(first.load(m).dense(), other.load(m).dense()) for m in first.infos)


def test_weights_may_be_those_of_numpy(tmp_path):
    folders = [saved(KINDS["plain"], tmp_path / name, i) for i, name in enumerate("ab")]
    merged = merge_adapters(folders, weights=np.array([0.75, 0.25]))
    assert yaml.safe_load(merged.config)["models"][0]["parameters"] == {"weight": 0.75}


def test_adapters_in_memory(tmp_path):
    adapters = [
        load_adapter(saved(KINDS["plain"], tmp_path / name, i)) for i, name in enumerate("ab")
    ]
    merged = merge_adapters(adapters, name="both")
    assert merged.adapter.name == "both"
    with pytest.raises(ConfigError, match="2 adapters called 'a'"):
        merge_adapters([adapters[0], adapters[0]])
    assert merge_adapters({"x": adapters[0], "y": adapters[0]}).report["adapters"][1]["name"] == "y"


def test_the_package_names_what_it_offers():
    for name in peft_merge.__all__:
        assert getattr(peft_merge, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = peft_merge.nothing


def test_whole_numbers_in_whole_modules_are_the_same_or_counters(tmp_path):
    """A batch norm beside factors counts its batches; places in a table have no mean."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
            self.norm.register_buffer("places", torch.arange(4))

    config = LoraConfig(target_modules=["linear"], modules_to_save=["norm"], r=2)
    for seed in range(2):
        model = get_peft_model(Model(), config)
        norm = model.base_model.model.norm.modules_to_save["default"]
        norm.num_batches_tracked.fill_(seed + 5)
        norm.running_mean.fill_(seed)
        model.save_pretrained(tmp_path / f"same{seed}")
        norm.places.add_(seed)
        model.save_pretrained(tmp_path / f"other{seed}")
    same, other = ([tmp_path / f"{name}{seed}" for seed in range(2)] for name in ("same", "other"))
    saved = merge_adapters(same, modules_to_save="average").adapter.saved
    assert saved["norm.num_batches_tracked"]() == 5
    assert torch.equal(saved["norm.running_mean"](), torch.full((4,), 0.5))
    assert torch.equal(saved["norm.places"](), torch.arange(4))
    with pytest.raises(ConfigError, match=r"norm\.places: found whole numbers that differ"):
        merge_adapters(other, modules_to_save="average")
    taken = merge_adapters(other, modules_to_save="other1").adapter.saved
    assert torch.equal(taken["norm.places"](), torch.arange(4) + 1)
