"""``base+adapter`` inputs: the same tensors as when PEFT merges first, and nothing else written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import IA3Config, LoraConfig
from transformers import LlamaForCausalLM

from mergekit_ext.errors import ConfigError, MergeWarning
from tests import models as small
from tests.host.adapters import merged_with_peft, saved_adapter, saved_base

QUIET = MergeOptions(quiet=True)
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3},
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "whole": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
}
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


class Case:
    """A base, its adapters, and the models that PEFT makes of them."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self.base = saved_base(folder / "base", dtype=dtype)
        self.adapters, self.wholes = {}, {}
        for seed, (name, config) in enumerate(CONFIGS.items()):
            path = saved_adapter(self.base, folder / name, config, seed, LlamaForCausalLM)
            self.adapters[name] = path
            self.wholes[name] = merged_with_peft(
                self.base, path, folder / f"{name}-whole", LlamaForCausalLM
            )

    def adapted(self, *names: str) -> list[str]:
        return [f"{self.base}+{self.adapters[name]}" for name in names]

    def whole(self, *names: str) -> list[str]:
        return [str(self.wholes[name]) for name in names]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"), request.param)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("exact"), torch.float32)


def configuration(method, models, base, parameters=None, **keys):
    content = small.config(method, models, base, parameters, **keys)
    return MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(content)))


def compare(found: Path, wanted: Path, tolerance: float) -> None:
    ours, theirs = small.state(found), small.state(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        torch.testing.assert_close(
            tensor.double(), theirs[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("names", [["lora"], ["patterns"], ["ia3"], ["whole"]], ids=str)
def test_one_adapter_is_what_peft_merges(case, names, tmp_path):
    for source, out in ((case.adapted, "ours"), (case.whole, "theirs")):
        config = configuration("linear", source(*names), None, {"weight": 1.0})
        run_merge(config, str(tmp_path / out), QUIET)
    compare(tmp_path / "ours", tmp_path / "theirs", PRECISION[case.dtype])
    assert any(
        not torch.equal(tensor, small.state(case.base)[name])
        for name, tensor in small.state(tmp_path / "ours").items()
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 0.5}),
        ("task_arithmetic", {"weight": 0.5}),
        ("ties", {"weight": 0.7, "density": 0.5}),
        ("nan", {}),
        ("nan_ties", {"density": 0.5, "granularity": "model"}),
        ("lore", {"mu_relative": 0.3, "lambda": 0.5}),
    ],
)
def test_methods_see_the_same_models(exact, method, parameters, tmp_path):
    for source, out in ((exact.adapted, "ours"), (exact.whole, "theirs")):
        base = exact.base if method != "linear" else None
        config = configuration(method, source("lora", "ia3", "patterns"), base, parameters)
        run_merge(config, str(tmp_path / out), QUIET)
    compare(tmp_path / "ours", tmp_path / "theirs", 2e-4 if method == "lore" else 2e-5)
