"""``base+adapter`` through the commands: mergekit-yaml, -multi, -pytorch, the check."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig
from transformers import LlamaForCausalLM

from tests import models as small
from tests.attacks.readers import command
from tests.host.adapters import merged_with_peft, saved_adapter, saved_base

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a base, two adapters, and what PEFT makes of them."""
    folder = tmp_path_factory.mktemp("models")
    base = saved_base(folder / "base")
    (base / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    (base / "tokenizer.json").write_text("{}")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        saved_adapter(base, folder / name, config, seed, LlamaForCausalLM)
        merged_with_peft(base, folder / name, folder / f"{name}-whole", LlamaForCausalLM)
    return folder


def adapted(models):
    return [f"{models / 'base'}+{models / name}" for name in CONFIGS]


def mean(models):
    states = [small.state(models / f"{name}-whole") for name in CONFIGS]
    return {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}


def compare(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def test_yaml(models, tmp_path):
    content = small.config("linear", adapted(models), None, {"weight": 0.5})
    yml = small.write_yaml(tmp_path / "merge.yml", content)
    cache = tmp_path / "cache"
    flags = ("--lora-merge-cache", cache)
    done = small.command_here("mergekit-yaml", yml, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--lora-merge-cache") == 1
    compare(small.state(tmp_path / "out"), mean(models))
    assert {path.name for path in tmp_path.iterdir()} == {"merge.yml", "out"}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "model_max_length": 7
    }
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_multi(models, tmp_path):
    """The base of an adapter is the result of another document."""
    base = str(models / "base")
    documents = [
        {
            "name": "same",
            "merge_method": "linear",
            "models": [{"model": base, "parameters": {"weight": 1.0}}],
        },
        small.config(
            "nan_linear", [f"same+{models / name}" for name in CONFIGS], None, {"weight": 1.0}
        ),
    ]
    yml = tmp_path / "multi.yml"
    yml.write_text(yaml.safe_dump_all(documents))
    checked = command("mergekit-ext", "check", yml)
    assert checked.code == 0, checked.text
    done = command("mergekit-multi", yml, "-I", tmp_path / "parts", "--out-path", tmp_path / "out")
    assert done.code == 0, done.text
    wanted = small.config(
        "nan_linear", [models / f"{name}-whole" for name in CONFIGS], None, {"weight": 1.0}
    )
    wanted["models"] = [{"model": str(models / f"{name}-whole")} for name in CONFIGS]
    yml = small.write_yaml(tmp_path / "wanted.yml", wanted)
    done = command("mergekit-yaml", yml, tmp_path / "wanted")
    assert done.code == 0, done.text
    compare(small.state(tmp_path / "out"), small.state(tmp_path / "wanted"))


def test_a_refused_adapter(models, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    dora = saved_adapter(models / "base", tmp_path / "dora", config, 1, LlamaForCausalLM)
    content = small.config("linear", [f"{models / 'base'}+{dora}"], None, {"weight": 1.0})
    yml = small.write_yaml(tmp_path / "merge.yml", content)
    for arguments in (("mergekit-ext", "check", yml), ("mergekit-yaml", yml, tmp_path / "out")):
        done = command(*arguments)
        assert done.code == 2, done.text
        for part in ("models[0]", "DoRA", "MERGEKIT_EXT_ADAPTERS=0"):
            assert part in done.text
    assert not (tmp_path / "out").exists()
