"""Written adapters mean the same to readers that know no patterns, and to PEFT's hot swap."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from peft_merge import load_tasks, merge_adapters
from peft_merge.cli import main
from tests.peft_merge import models

PREFIX = "base_model.model."
# Adapters of one Llama whose ranks, alphas and modules differ.
UNLIKE = ("plain", "patterns", "rslora_patterns", "regex")
FEW = pytest.mark.filterwarnings("ignore:.* share . of the . modules")


def read(folder, *, by_tensor):
    """The change of every module by the rules of other readers, which know no patterns.

    llama.cpp divides `lora_alpha` by the rank of each tensor, vLLM by the one `r` of the file.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            scale = config["lora_alpha"] / (len(a) if by_tensor else config["r"])
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            changes[module] = scale * b.double() @ a.double()
    return changes


def by_peft(kind, folder):
    model = models.reloaded(kind, folder)
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def agree(kind, folder):
    expected = by_peft(kind, folder)
    for by_tensor in (True, False):
        found = read(folder, by_tensor=by_tensor)
        assert found.keys() == expected.keys()
        for module, change in found.items():
            torch.testing.assert_close(change, expected[module], rtol=1e-5, atol=1e-5)


def folders(tmp_path, names):
    return [
        models.saved(models.KINDS[name], tmp_path / f"{name}-{i}", i)
        for i, name in enumerate(names)
    ]


@FEW
@pytest.mark.parametrize("rank", [None, 3, {"energy": 0.8}, "lossless"])
def test_a_merged_adapter_is_read_alike(rank, tmp_path):
    sources = folders(tmp_path, UNLIKE)
    merge_adapters(sources, "ties", rank=rank).save(tmp_path / "out")
    agree(models.KINDS["plain"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]


@FEW
def test_patterns_are_written_when_they_are_asked_for(tmp_path):
    sources = folders(tmp_path, ("plain", "plain", "regex"))
    document = {"merge_method": "linear", "models": [{"model": str(s)} for s in sources]}
    (tmp_path / "m.yml").write_text(json.dumps(document))
    (tmp_path / "p.yml").write_text(json.dumps({**document, "patterns": True}))
    for name, options in (("m", []), ("p", []), ("asked", ["--patterns"])):
        config = str(tmp_path / ("p.yml" if name == "p" else "m.yml"))
        run = CliRunner().invoke(main, [config, str(tmp_path / name), "--quiet", *options])
        assert run.exit_code == 0, run.output
    sizes = {
        name: (tmp_path / name / "adapter_model.safetensors").stat().st_size
        for name in ("m", "p", "asked")
    }
    assert sizes["p"] == sizes["asked"] < sizes["m"]
    one, patterned = (by_peft(models.KINDS["plain"], tmp_path / name) for name in ("m", "p"))
    for module, change in patterned.items():
        torch.testing.assert_close(change, one[module], rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        agree(models.KINDS["plain"], tmp_path / "p")
    check = CliRunner().invoke(main, ["--check", str(tmp_path / "m.yml")]).output
    assert "rank 8 in every module" in check
    assert (
        "PEFT and vLLM read"
        in CliRunner().invoke(main, ["--check", str(tmp_path / "p.yml")]).output
    )


@FEW
def test_tasks_of_a_flexmerge_are_read_alike_and_swapped(tmp_path):
    kind = models.KINDS["plain"]
    sources = folders(tmp_path, UNLIKE)
    names = [f"t{i}" for i in range(len(sources))]
    given = dict(zip(names, sources, strict=True))
    found = merge_adapters(given, "flexmerge", parameters={"target_size": 2.5})
    found.save(tmp_path / "out")
    expected = {}
    for name in names:
        agree(kind, tmp_path / "out" / name)
        expected[name] = models.answer(kind, models.reloaded(kind, tmp_path / "out" / name))
    # The model holds the modules of all tasks, as a server prepares it.
    widest = max(names, key=lambda name: len(by_peft(kind, tmp_path / "out" / name)))
    model = models.reloaded(kind, tmp_path / "out" / widest)
    for name in names:
        hotswap_adapter(model, str(tmp_path / "out" / name), "default", torch_device="cpu")
        torch.testing.assert_close(models.answer(kind, model), expected[name])
    shared = load_tasks(models.base(kind), tmp_path / "out")
    for name in names:
        shared.set_adapter(name)
        torch.testing.assert_close(models.answer(kind, shared), expected[name])


def test_groups_of_convolutions_share_one_rank_evenly(tmp_path):
    kind = models.KINDS["convolutions"]
    merge_adapters(folders(tmp_path, ("convolutions",) * 3)).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(a) for key, a in tensors.items() if "lora_A" in key} == {config["r"]}
    assert torch.isfinite(models.answer(kind, models.reloaded(kind, tmp_path / "out"))).all()
