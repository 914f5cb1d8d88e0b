"""Folders and loaded models of real adapters: every task computes what its adapter says."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel

from mergekit_ext.errors import ConfigError
from peft_merge import load_tasks
from peft_merge.io.read import load_adapter
from peft_merge.merge import merge_adapters, run_config
from tests.peft_merge.models import KINDS, answer, base, reloaded, saved

TASKS = ["t0", "t1", "t2"]

# PEFT holds one of these for all adapters of a model.
ALONE = {"bias_all", "bias_lora_only", "tied_saved"}


def inputs(kind, tmp_path, count=3):
    return [saved(KINDS[kind], tmp_path / name, i) for i, name in enumerate(TASKS[:count])]


def written(sources, out, target, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = merge_adapters(sources, "flexmerge", parameters={"target_size": target, **options})
    found.save(out)
    return found


def together(kind, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_tasks(base(KINDS[kind]), folder)


def parameters_of(model):
    """All that is not the base's, each parameter once."""
    return {
        key: p for key, p in model.named_parameters() if any(f".{name}" in key for name in TASKS)
    }


def close(left, right):
    return float((left - right).abs().max()) <= 1e-5 * max(1.0, float(right.abs().max()))


def alone(kind, folder):
    return answer(KINDS[kind], reloaded(KINDS[kind], folder))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_adapter(kind, tmp_path):
    sources = inputs(kind, tmp_path, 2)
    apart = written(sources, tmp_path / "apart", 2)
    for source, adapter in zip(sources, apart.adapters, strict=True):
        # Not the same bits: a scaling that is no power of two is rounded into B.
        assert close(alone(kind, tmp_path / "apart" / adapter.name), alone(kind, source))
    if kind in ALONE:
        with pytest.raises(ConfigError, match="by itself"):
            together(kind, tmp_path / "apart")
        return
    found = written(sources, tmp_path / "out", 1.4)
    model = together(kind, tmp_path / "out")
    stored = sum(p.nbytes for p in parameters_of(model).values())
    own_base = sum(
        tensor().nbytes
        for name, tensor in found.adapters[0].saved.items()
        if kind in ("embedding", "tied_factors")
    )
    assert stored == found.report["size"]["bytes"] - own_base
    for task in TASKS[:2]:
        model.set_adapter(task)
        assert close(answer(KINDS[kind], model), alone(kind, tmp_path / "out" / task))


def test_some_sizes(tmp_path):
    sources = inputs("patterns", tmp_path)
    sizes = merge_adapters(sources, "flexmerge", parameters={"target_size": 3}).report["sizes"]
    assert sizes[0] == 3 and sizes[-1] == 1 and len(sizes) == 1 + 2 * 6
    for step, size in enumerate(sizes[::4]):
        out = tmp_path / f"out{step}"
        found = written(sources, out, size)
        assert found.report["size"]["adapters"] == pytest.approx(size, abs=1e-6)
        model = together("patterns", out)
        assert sum(p.nbytes for p in parameters_of(model).values()) == found.report["size"]["bytes"]
        for task in TASKS:
            model.set_adapter(task)
            assert close(answer(KINDS["patterns"], model), alone("patterns", out / task))


@pytest.mark.parametrize(("first", "second"), [("plain", "excluded"), ("rslora", "patterns")])
def test_adapters_of_different_modules_and_scalings(first, second, tmp_path):
    """A task gets modules that it did not have, and keeps its own scalings beside them."""
    sources = [saved(KINDS[first], tmp_path / "t0", 1), saved(KINDS[second], tmp_path / "t1", 2)]
    found = merge_adapters(sources, "flexmerge", parameters={"target_size": 1.7})
    found.save(tmp_path / "out")
    model = together(first, tmp_path / "out")
    for adapter in found.adapters:
        kind = KINDS[first]
        single = reloaded(kind, tmp_path / "out" / adapter.name)
        named = dict(single.named_modules())
        changed = 0
        for module in adapter.infos:
            layer = named[f"base_model.model.{module}"]
            assert torch.allclose(
                layer.get_delta_weight("default").double(),
                adapter.load(module).dense()[0],
                atol=1e-5,
            )
            changed += 1
        assert changed == sum("lora_A.default" in key for key in single.state_dict())
        model.set_adapter(adapter.name)
        assert close(answer(kind, model), answer(kind, single))


def test_shared_tensors_are_one_storage_and_stay_so(tmp_path):
    found = written(inputs("plain", tmp_path), tmp_path / "out", 2)
    model = together("plain", tmp_path / "out")

    def check(bytes_each):
        for block in found.report["blocks"]:
            for group in block["groups"]:
                for module in group["modules"]:
                    layer = model.base_model.model.get_submodule(module)
                    pointers = {layer.lora_A[task].weight.data_ptr() for task in group["tasks"]}
                    pointers |= {layer.lora_B[task].weight.data_ptr() for task in group["tasks"]}
                    assert len(pointers) == 2
        own = {p.data_ptr(): p.numel() * bytes_each for p in parameters_of(model).values()}
        assert sum(own.values()) == found.report["size"]["bytes"] * bytes_each // 4

    check(4)
    model.to(torch.float64)
    check(8)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("of_the_base", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_keep_their_own_dtypes_on_every_base(of_the_base, tmp_path):
    dtypes = [torch.bfloat16, torch.float32, torch.float32]
    sources = [
        saved(KINDS["plain"], tmp_path / name, i, dtype)
        for i, (name, dtype) in enumerate(zip(TASKS, dtypes, strict=True))
    ]
    found = merge_adapters(sources, "flexmerge", parameters={"target_size": 2})
    found.save(tmp_path / "out")
    model = load_tasks(base(KINDS["plain"]).to(of_the_base), tmp_path / "out")
    for adapter in found.adapters:
        assert len({info.dtype for info in found.adapters[0].infos.values()}) == 2
        for module in adapter.infos:
            layer, update = model.base_model.model.get_submodule(module), adapter.load(module)
            for held, stored in ((layer.lora_A, update.a), (layer.lora_B, update.b)):
                assert held[adapter.name].weight.dtype == stored.dtype
                assert torch.equal(held[adapter.name].weight, stored[0])
    own = {p.data_ptr(): p.nbytes for p in parameters_of(model).values()}
    assert sum(own.values()) == found.report["size"]["bytes"]
    model(**KINDS["plain"].inputs(), adapter_names=TASKS[:2])


def test_a_copy_of_the_base_beside_factors_replaces_nothing(tmp_path):
    kinds = ("plain", "embedding", "plain")
    sources = [
        saved(KINDS[k], tmp_path / n, i) for i, (k, n) in enumerate(zip(kinds, TASKS, strict=True))
    ]
    written(sources, tmp_path / "out", 3)
    model = together("plain", tmp_path / "out")
    for name in TASKS:
        model.set_adapter(name)
        assert close(answer(KINDS["plain"], model), alone("plain", tmp_path / "out" / name))
    changed = base(KINDS["plain"])
    changed.model.embed_tokens.weight.data[0, 0] += 1.0  # what is carried is another tensor now
    with pytest.raises(ConfigError, match="which this task alone replaces"):
        load_tasks(changed, tmp_path / "out")


def test_the_base_is_not_copied(tmp_path):
    written(inputs("plain", tmp_path), tmp_path / "out", 2)
    model = base(KINDS["plain"])
    before = {p.data_ptr() for p in model.parameters()}
    loaded = load_tasks(model, tmp_path / "out")
    own = {p.data_ptr() for p in parameters_of(loaded).values()}
    assert {p.data_ptr() for p in loaded.parameters()} - own == before


def test_rows_of_one_batch_may_be_of_different_tasks(tmp_path):
    written(inputs("plain", tmp_path), tmp_path / "out", 2)
    model = together("plain", tmp_path / "out")
    tokens = torch.tensor([[1, 5, 9, 30, 2, 7]])
    names = ["t2", "__base__", "t0", "t1", "t0"]
    with torch.no_grad():
        mixed = model(input_ids=tokens.repeat(5, 1), adapter_names=names).logits
        for row, name in zip(mixed, names, strict=True):
            if name == "__base__":
                expected = base(KINDS["plain"])(input_ids=tokens).logits[0]
            else:
                single = PeftModel.from_pretrained(base(KINDS["plain"]), tmp_path / "out" / name)
                expected = single.eval()(input_ids=tokens).logits[0]
            assert torch.allclose(row, expected, atol=1e-4)


def test_every_task_keeps_its_own_head(tmp_path):
    sources = inputs("modules_to_save", tmp_path)
    found = written(sources, tmp_path / "out", 1)
    for source, adapter in zip(map(load_adapter, sources), found.adapters, strict=True):
        assert source.saved.keys() == adapter.saved.keys()
        for name in source.saved:
            assert torch.equal(source.saved[name](), adapter.saved[name]())
    size = found.report["size"]
    assert size["private_bytes"] == sum(
        t().nbytes for adapter in found.adapters for t in adapter.saved.values()
    )


def test_yaml_and_what_is_written(tmp_path):
    for i, name in enumerate(TASKS):
        saved(KINDS["plain"], tmp_path / name, i)
    config = tmp_path / "merge.yml"
    models = "".join(f"  - model: {tmp_path / name}\n    name: task_{name}\n" for name in TASKS)
    config.write_text(
        f"merge_method: flexmerge\nmodels:\n{models}parameters:\n  target_size: 3kB\n"
        "  linkage: average\nbase_model: org/base\n"
    )
    result = run_config(config, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tasks = {f"task_{name}" for name in TASKS}
    assert names == tasks | {"flexmerge.json", "merge_report.json", "merge_config.yml", "README.md"}
    assert (tmp_path / "out" / "merge_config.yml").read_text() == config.read_text()
    manifest = json.loads((tmp_path / "out" / "flexmerge.json").read_text())
    assert manifest["size"]["bytes"] == result.report["size"]["bytes"] <= 3000
    disk = sum(
        path.stat().st_size
        for task in tasks
        for path in (tmp_path / "out" / task).glob("adapter_*")
    )
    assert manifest["size"]["disk_bytes"] == disk
    assert manifest["method"]["linkage"] == "average"
    stored = json.loads((tmp_path / "out" / "task_t0" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "org/base"
    assert "target_size: 3kB" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="which is not empty"):
        run_config(config, tmp_path / "out")
