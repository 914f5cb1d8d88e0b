"""The example of CONTRIBUTING.md: one file adds a method to mergekit, FlexMerge and adapters."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel

from tests import models
from tests.peft_merge import models as adapters

ROOT = Path(__file__).resolve().parents[2]
LORA = adapters.KINDS["rslora"]
MERGE = """
import sys, runpy, pathlib
sys.path.insert(0, sys.argv[1])
import mergekit_ext, peft_merge
runpy.run_path(sys.argv[2])
from mergekit.options import MergeOptions
here = pathlib.Path(sys.argv[3])
for name in ("median", "nan_median", "flexmerge"):
    mergekit_ext.merge(here / f"{name}.yml", here / name, MergeOptions(quiet=True))
folders = [here / f"a{seed}" for seed in range(3)]
peft_merge.merge_adapters(folders, "median", rank="lossless").save(here / "adapter")
"""


def test_one_file_is_a_method_for_all_drivers(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(example.splitlines()) < 60
    (tmp_path / "median.py").write_text(example)
    base, tuned = models.family(tmp_path, models.llama)
    for name, parameters in (
        ("median", {"lambda": 0.5}),
        ("nan_median", {"scale": 1.0}),
        ("flexmerge", {"algorithm": "median", "target_size": 1.0}),
    ):
        content = models.config(name, tuned, base, parameters)
        models.write_yaml(tmp_path / f"{name}.yml", content)
    for seed in range(3):
        adapters.saved(LORA, tmp_path / f"a{seed}", seed)
    command = [sys.executable, "-c", MERGE, ROOT, tmp_path / "median.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    start = models.state(base)
    deltas = {k: torch.stack([models.state(t)[k] - start[k] for t in tuned]) for k in start}
    once = models.state(tmp_path / "median")
    shared = models.state(tmp_path / "flexmerge")
    weighed = models.state(tmp_path / "nan_median")
    for name, delta in deltas.items():
        median = delta.double().median(dim=0).values
        assert torch.allclose(once[name].double(), start[name] + 0.5 * median, atol=1e-6)
        assert torch.allclose(shared[name].double(), start[name] + median, atol=1e-6)
        inverse = 1 / delta.double().flatten(1).norm(dim=1)
        weights = (inverse / inverse.sum()).reshape(-1, *[1] * (delta.ndim - 1))
        wanted = start[name] + (weights * delta).median(dim=0).values
        assert torch.allclose(weighed[name].double(), wanted, atol=1e-6)

    changes = [adapters.reloaded(LORA, tmp_path / f"a{seed}") for seed in range(3)]
    merged = adapters.reloaded(LORA, tmp_path / "adapter")
    for module, found in _deltas(merged).items():
        wanted = torch.stack([_deltas(model)[module] for model in changes]).median(dim=0).values
        assert torch.allclose(found, wanted, atol=1e-4)


def _deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    }
