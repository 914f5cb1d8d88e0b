"""Residual checkpoints in modules: what a base and factors compute, hold, save and refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ext.flexmerge import load
from mergekit_ext.flexmerge.reader import export, open_checkpoint
from tests.flexmerge.handmade import models, write
from tests.flexmerge.test_placement import logits_of
from tests.flexmerge.test_runtime import KINDS, TASKS, independent, logits
from tests.host.flexmerge_models import gpt2

MAKERS = {kind: (make, private) for kind, (make, private, _) in KINDS.items()}
MAKERS["gpt2"] = (gpt2, "transformer.ln_f")
KINDS["gpt2"] = (*MAKERS["gpt2"], KINDS["llama"][2])
# Stacked experts, their router, and tables that are added as they are.
FORMED = {"mixtral": ("experts", "gate"), "vit": ("position_embeddings", "cls_token")}


@pytest.fixture(scope="module", params=MAKERS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    make, private = MAKERS[request.param]
    folder = tmp_path_factory.mktemp("factored")
    base, paths = models(folder, make, TASKS)
    write(folder / "out", base, paths, lambda block: [(TASKS, "residual")], private)
    for task in TASKS:
        export(folder / "out", task, folder / "exported" / task)
    return folder, request.param


def close(model: Any, folder: Path, task: str, kind: str, dtype: Any = None) -> bool:
    """Are the results those of the exported folder, to rounding?"""
    wide = dtype is None
    other = independent(folder / "exported", task, **({} if wide else {"dtype": dtype}))
    ours, theirs = logits_of(model, kind), logits(other, kind)
    return torch.allclose(ours, theirs, *((1e-4, 1e-5) if wide else (0.1, 0.1)))


def held(loaded: dict[str, Any]) -> int:
    """The bytes of all parameters that lie at different places."""
    parameters = [p for model in loaded.values() for p in model.parameters()]
    return sum({p.data_ptr(): p.nbytes for p in parameters}.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_results_are_those_of_the_exported_folders(made: tuple[Path, str], dtype: Any) -> None:
    folder, kind = made
    for task, model in load(folder / "out", dtype=dtype).items():
        assert type(model) is type(independent(folder / "exported", task))
        assert close(model, folder, task, kind, dtype)
        assert any(name.endswith("theta_0") for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_all_tasks_take_the_memory_of_the_checkpoint(made: tuple[Path, str], dtype: Any) -> None:
    folder, kind = made
    loaded = load(folder / "out", dtype=dtype)
    stored = open_checkpoint(folder / "out").manifest.size.bytes
    names = FORMED.get(kind, ())
    formed = sum(
        tensor.nbytes
        for model in loaded.values()
        for name, tensor in model.named_parameters()
        if any(part in name for part in names)
    )
    assert held(loaded) <= stored // (1 if dtype is None else 2) + formed
    assert held(loaded) < held(load(folder / "out", merged=True, dtype=dtype))


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_merged_modules_are_ordinary(made: tuple[Path, str]) -> None:
    folder, kind = made
    model, other = load(folder / "out", "b", merged=True), independent(folder / "exported", "b")
    assert [*model.state_dict()] == [*other.state_dict()]
    for (name, value), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, theirs), name
    assert torch.equal(logits(model, kind), logits(other, kind))


def test_a_saved_module_is_the_exported_folder(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = made
    load(folder / "out", "a").save_pretrained(tmp_path / "a")
    saved, other = independent(tmp_path, "a"), independent(folder / "exported", "a")
    assert {p.name for p in tmp_path.glob("a/*.safetensors")} == {"model.safetensors"}
    sizes = [
        (path / "a/model.safetensors").stat().st_size for path in (tmp_path, folder / "exported")
    ]
    assert abs(sizes[0] - sizes[1]) < 4096
    for (name, value), theirs in zip(saved.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, theirs), name


@pytest.mark.parametrize("made", ["tied llama", "bert", "mixtral"], indirect=True)
def test_over_several_devices(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, kind = made
    first = "bert" if kind == "bert" else "model"
    for number, device_map in enumerate([{"": "cpu:0"}, {"": "cpu", first: "disk"}]):
        place = tmp_path / str(number)
        loaded = load(folder / "out", device_map=device_map, offload_folder=place)
        for task in ("a", "d"):
            assert close(loaded[task], folder, task, kind)
    if kind != "mixtral":
        # The checkpoint has base and factors as they are.
        assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("made", ["tied llama"], indirect=True)
def test_tied_weights_stay_tied(made: tuple[Path, str]) -> None:
    model = load(made[0] / "out", "a", dtype=torch.bfloat16)
    for part in ("theta_0", "lora_A", "lora_B"):
        assert getattr(model.lm_head, part) is getattr(model.model.embed_tokens, part)


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_what_is_asked_of_a_weight(made: tuple[Path, str]) -> None:
    model = load(made[0] / "out", "a")
    layer = model.model.layers[0].mlp.up_proj
    weight, expected = layer.weight, load(made[0] / "out", "a", merged=True)
    whole = expected.model.layers[0].mlp.up_proj.weight
    assert weight.shape == whole.shape and weight.dtype == whole.dtype
    assert torch.equal(weight + 0, whole) and torch.equal(weight.T @ weight, whole.T @ whole)
    assert torch.equal(copy.deepcopy(model).model.layers[0].mlp.up_proj.weight.float(), whole)
    for change in (
        lambda: weight.add_(1),
        lambda: weight.copy_(whole),
        lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(weight, "data", whole),
    ):
        with pytest.raises(TypeError, match="merged=True"):
            change()
    with pytest.raises(RuntimeError, match="merged=True"):
        model.load_state_dict(expected.state_dict())


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_factors_can_be_trained(made: tuple[Path, str]) -> None:
    model = load(made[0] / "out", "a")
    model(**KINDS["llama"][2]()).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.lora_A.grad.abs().sum() > 0
