"""Sound inputs for every reader, and how each is started.

A reader is started in this process, as its command would be, and gives its exit code and what it
printed; those that are functions give the code 2 for an error of the project.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_ext.errors import MergekitExtError
from tests.host.adapters import saved_adapter
from tests.models import command_here, config, family, write_yaml


@dataclass(frozen=True)
class Outcome:
    """How a reader ended."""

    code: int
    text: str


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def make_inputs(folder: Path) -> Path:
    """Models, adapters, and outputs of FlexMerge: all that any reader reads, and no fault in it."""
    base, tuned = family(folder, llama, amounts=(0.01, 0.02, 0.03))
    for index in range(2):
        chosen = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        saved_adapter(base, folder / f"adapter{index}", chosen, index, LlamaForCausalLM)
    for path in (base, *tuned):
        (path / "generation_config.json").unlink(missing_ok=True)
    where = folder / "flex.yml"
    write_yaml(where, config("flexmerge", tuned, base, {"target_size": 2.5, "algorithm": "emr"}))
    outcome = command("mergekit-ext", "merge", where, folder / "flex", "--quiet")
    assert outcome.code == 0, outcome.text
    adapters = [folder / "adapter0", folder / "adapter1"]
    write_yaml(where, config("flexmerge", adapters, None, {"target_size": 1.0}))
    outcome = command("peft-merge", where, folder / "tasks", "--quiet")
    assert outcome.code == 0, outcome.text
    where.unlink()
    return folder


def command(name: str, *arguments: object) -> Outcome:
    """Run a command in this process, with warnings as a user sees them."""
    done = command_here(name, *arguments)
    return Outcome(done.returncode, done.stdout + done.stderr)


def function(call: Callable[[], object]) -> Outcome:
    """Call a function of the API."""
    try:
        call()
    except MergekitExtError as error:
        return Outcome(2, str(error))
    return Outcome(0, "")


def merge_models(method: str, parameters: dict[str, Any], name: str = "mergekit-ext merge") -> Any:
    """A reader that merges the three models."""

    def read(inputs: Path, out: Path) -> Outcome:
        models = [inputs / f"tuned{index}" for index in range(3)]
        text = config(method, models, inputs / "base", parameters)
        file = write_yaml(out.parent / f"{method}.yml", text)
        words = name.split()
        place = [] if words[-1] == "check" else [out]
        quiet = [] if words[-1] == "check" else ["--quiet"]
        return command(*words, file, *place, *quiet)

    return read


def merge_base_and_adapter(inputs: Path, out: Path) -> Outcome:
    models = [f"{inputs / 'base'}+{inputs / f'adapter{index}'}" for index in range(2)]
    text = config("nan", [Path(model) for model in models])
    return command(
        "mergekit-ext", "merge", write_yaml(out.parent / "lora.yml", text), out, "--quiet"
    )


def merge_adapters(inputs: Path, out: Path) -> Outcome:
    models = [inputs / "adapter0", inputs / "adapter1"]
    text = config("linear", models)
    return command("peft-merge", write_yaml(out.parent / "peft.yml", text), out, "--quiet")


def load_adapter(inputs: Path, out: Path) -> Outcome:
    from peft_merge.io.read import load_adapter as load

    return function(lambda: load(inputs / "adapter0"))


def load_flexmerge(inputs: Path, out: Path) -> Outcome:
    from mergekit_ext import flexmerge

    return function(lambda: flexmerge.load(inputs / "flex", "tuned0"))


def export(inputs: Path, out: Path) -> Outcome:
    return command("mergekit-ext", "export", inputs / "flex", "tuned0", out)


def load_tasks(inputs: Path, out: Path) -> Outcome:
    from peft_merge.flexmerge.load import load_tasks as load

    torch.manual_seed(0)
    return function(lambda: load(llama(), inputs / "tasks"))


check_nan = merge_models("nan_ties", {"density": 0.5}, "mergekit-ext check")
merge_nan = merge_models("nan_ties", {"density": 0.5})
merge_with_yaml = merge_models("nan_ties", {"density": 0.5}, "mergekit-yaml")
merge_lore = merge_models("lore", {"mu_relative": 0.1, "lambda": 0.5})
merge_flexmerge = merge_models("flexmerge", {"target_size": 2.0})

Reader = Callable[[Path, Path], Outcome]

# For each reader a file of weights that it reads.
WEIGHTS: dict[str, tuple[Reader, str]] = {
    "mergekit-ext check": (check_nan, "tuned1/model.safetensors"),
    "nan_ties": (merge_nan, "tuned1/model.safetensors"),
    "lore": (merge_lore, "base/model.safetensors"),
    "flexmerge": (merge_flexmerge, "tuned2/model.safetensors"),
    "base+adapter": (merge_base_and_adapter, "adapter1/adapter_model.safetensors"),
    "peft-merge": (merge_adapters, "adapter1/adapter_model.safetensors"),
    "load_adapter": (load_adapter, "adapter0/adapter_model.safetensors"),
    "flexmerge.load": (load_flexmerge, "flex/shards/*"),
    "export": (export, "flex/shards/*"),
    "load_tasks": (load_tasks, "tasks/adapter0/adapter_model.safetensors"),
}
# And one of JSON.
JSON: dict[str, tuple[Reader, str]] = {
    "config.json, check": (check_nan, "tuned1/config.json"),
    "config.json, flexmerge": (merge_flexmerge, "tuned1/config.json"),
    "config.json, base+adapter": (merge_base_and_adapter, "base/config.json"),
    "index, nan_ties": (merge_nan, "tuned1/model.safetensors.index.json"),
    "index, flexmerge": (merge_flexmerge, "tuned1/model.safetensors.index.json"),
    "adapter_config.json, peft-merge": (merge_adapters, "adapter1/adapter_config.json"),
    "adapter_config.json, base+adapter": (merge_base_and_adapter, "adapter1/adapter_config.json"),
    "manifest, flexmerge.load": (load_flexmerge, "flex/flexmerge.json"),
    "manifest, export": (export, "flex/flexmerge.json"),
    "manifest, load_tasks": (load_tasks, "tasks/flexmerge.json"),
}


def file_of(inputs: Path, pattern: str) -> Path:
    """The file that is attacked; of several the first."""
    return sorted(inputs.glob(pattern))[0] if "*" in pattern else inputs / pattern


def own_up(inputs: Path, file: Path) -> None:
    """Let the manifests say of a changed file what is true: an attacker can change both."""
    manifest = inputs / "flex" / "flexmerge.json"
    content = json.loads(manifest.read_text())
    for entry in content["files"]:
        if (inputs / "flex" / entry["path"]) == file:
            entry.update(_state(file))
    manifest.write_text(json.dumps(content))
    manifest = inputs / "tasks" / "flexmerge.json"
    content = json.loads(manifest.read_text())
    for task in content["tasks"]:
        for entry in task["files"]:
            if (inputs / "tasks" / task["name"] / entry["name"]) == file:
                entry.update(_state(file))
    manifest.write_text(json.dumps(content))


def _state(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def copied(inputs: Path, place: Path) -> Path:
    """A copy to spoil; links between files of an output become files."""
    return Path(shutil.copytree(inputs, place))
