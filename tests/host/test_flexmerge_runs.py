"""FlexMerges as they are run: commands, plain loaders, what is left behind, what is used again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.events import MergeCallback
from mergekit_ext.flexmerge.manifest import read_manifest
from tests import models as small
from tests.host.flexmerge_models import (
    MAKERS,
    TASKS,
    Family,
    as_index_says,
    digests,
    merge,
)

LOAD = """
import json, sys, torch
from transformers import AutoConfig, AutoModel
import transformers
torch.manual_seed(0)
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    if hasattr(config, "patch_size"):
        given = {"pixel_values": torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)}
    else:
        ids = torch.arange(2, 12).reshape(1, 10)
        given = {"input_ids": ids}
        if config.is_encoder_decoder:
            given["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        found[folder] = model.eval()(**given).logits
assert "mergekit_ext.flexmerge" not in sys.modules and "mergekit" not in sys.modules
torch.save(found, sys.argv[1])
"""


def logits(folders: Sequence[Path], scratch: Path) -> list[Tensor]:
    """What plain transformers computes, in a process without this project."""
    result = scratch / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, result, *folders],
        capture_output=True,
        text=True,
        cwd=scratch,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MERGEKIT_EXT_AUTOLOAD": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(result)
    return [found[str(folder)] for folder in folders]


def test_plain_transformers_loads_every_task(families, tmp_path):
    """All architectures in one process: each task computes what the expected model does."""
    pairs: list[tuple[Path, Path]] = []
    for name in MAKERS:
        family = families(name)
        out = tmp_path / name
        merge(family.content(2), out)
        base, models = family.states
        manifest = read_manifest(out)
        for number, task in enumerate(TASKS):
            expected = tmp_path / f"{name}-{task}-expected"
            shutil.copytree(family.tuned[number], expected)
            state = dict(models[number])
            for block in manifest.blocks:
                (group,) = [g for g in block.groups if task in g.tasks]
                for tensor in block.tensors:
                    members = [models[TASKS.index(t)][tensor.name].double() for t in group.tasks]
                    mean = sum(members) / len(members)
                    state[tensor.name] = mean.to(base[tensor.name].dtype).contiguous()
            save_file(state, expected / "model.safetensors", {"format": "pt"})
            pairs.append((out / task, expected))
        if name != "bert" and not manifest.private:
            merge(family.content(1), tmp_path / f"{name}-one")
            pairs.append((tmp_path / f"{name}-one", tmp_path / f"{name}-one" / "tuned0"))
    assert len(pairs) > 15
    found = logits([folder for pair in pairs for folder in pair], tmp_path)
    for (folder, _), one, other in zip(pairs, found[::2], found[1::2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), folder
    # And they are not all the same model.
    assert not torch.allclose(found[0], found[2])


def test_stock_mergekit_yaml_and_our_command_write_the_same(families, tmp_path):
    family = families("llama")
    config = small.write_yaml(tmp_path / "m.yml", family.content(1.7, "ties"))
    stock = small.command("mergekit-yaml", config, tmp_path / "stock", "--quiet")
    assert stock.returncode == 0, stock.stderr
    ours = small.command("mergekit-ext", "merge", config, tmp_path / "ours", "--quiet")
    assert ours.returncode == 0, ours.stderr
    assert digests(tmp_path / "stock") == digests(tmp_path / "ours")
    merge(yaml.safe_load(config.read_text()), tmp_path / "called")
    called, wanted = digests(tmp_path / "called"), digests(tmp_path / "stock")
    # The text of the configuration was not the same.
    del called["mergekit_config.yml"], wanted["mergekit_config.yml"]
    assert called == wanted
    readme = (tmp_path / "stock" / "README.md").read_text()
    assert "flexmerge" in readme.lower()
    assert re.search(r"1\.\d+", readme)


def test_runs_are_alike_and_seeds_are_not(families, tmp_path):
    family = families("llama")
    content = family.content(1.8, "average", order="random", dare_density=0.5)
    outs = []
    for number, seed in enumerate((1, 1, 2)):
        merge(content, tmp_path / str(number), random_seed=seed)
        outs.append({k: v for k, v in digests(tmp_path / str(number)).items() if "shards" in k})
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]


@pytest.mark.parametrize("place", ["base", "tuned1"])
def test_a_value_that_is_not_finite(place, families, tmp_path):
    family = families("llama")
    folder = tmp_path / "spoiled" / place
    shutil.copytree(family.base.parent / place, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    content = family.content(1.5)
    if place == "base":
        content["base_model"] = str(folder)
    else:
        content["models"][1]["model"] = str(folder)
    with pytest.raises(NonFiniteError) as caught:
        merge(content, tmp_path / "out" / "deep")
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"
    assert caught.value.model == ("the base model" if place == "base" else "tuned1")
    assert not (tmp_path / "out" / "deep").exists()
    assert not list(tmp_path.rglob("*incomplete*"))


def test_a_merged_value_that_leaves_the_range(tmp_path):
    base, tuned = small.family(tmp_path, small.llama, torch.float16)
    for folder in tuned:
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"][0, 0] = 60_000
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"lm_head\.weight.*float16"):
        merge(Family(base, tuned).content(1, "task_arithmetic"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", *TASKS]


class Listener(MergeCallback):
    def __init__(self, stop_at: int | None = None):
        self.heard, self.groups, self.stop_at, self.sizes = [], {}, stop_at, []

    def on_merge_begin(self, event):
        self.heard.append("begin")

    def on_statistics_begin(self, event):
        self.heard.append("statistics")

    def on_block_merged(self, event):
        self.groups[event.name] = event.groups
        if len(self.groups) == self.stop_at:
            raise RuntimeError("enough")

    def on_size_reached(self, event):
        self.sizes.append(event)

    def on_merge_end(self, event):
        self.heard.append("end")


def test_an_exception_in_the_middle(families, tmp_path):
    family = families("llama")
    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        with pytest.raises(RuntimeError, match="enough"):
            merge(family.content(1.5), out, Listener(stop_at=7))
        assert not out.exists() or not list(out.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
    merge(family.content(1.5), tmp_path / "empty")
    assert as_index_says(tmp_path / "empty" / "tuned0")


def test_after_an_interrupt_another_configuration_takes_what_still_holds(families, tmp_path):
    """The analysis and untouched blocks are used again, the others are not."""
    family = families("llama")

    class Interrupt(Listener):
        def on_statistics_end(self, event):
            self.heard.append("measured")

        def on_block_merged(self, event):
            super().on_block_merged(event)
            if len(self.groups) == 5:
                raise KeyboardInterrupt

    wanted = {}
    for name, target in (("average", 1.6), ("task_arithmetic", 1.3), ("task_arithmetic", 1.3)):
        listener = Interrupt()
        with pytest.raises(KeyboardInterrupt):
            merge(family.content(target, name), tmp_path / "one" / "out", listener)
        assert not (tmp_path / "one" / "out").exists()
        wanted[name] = listener.heard
    assert wanted["average"] == ["begin", "statistics", "measured"]
    (staged,) = (tmp_path / "one").iterdir()
    journals = [path.read_text() for path in sorted(staged.glob("journal-*-0.lines"))]
    assert len(journals) == 2  # the third run had nothing to note
    lines = [json.loads(line[9:]) for text in journals for line in text.splitlines()]
    measured = [key for kind, key, _ in lines if kind == "gram"]
    assert len(measured) == len(set(measured)) > 5
    merged = [key for kind, key, _ in lines if kind == "block"]
    assert len(merged) == 10  # five by each algorithm; the third run found those of the second
    merge(family.content(1.3, "task_arithmetic"), tmp_path / "one" / "out")
    merge(family.content(1.3, "task_arithmetic"), tmp_path / "two" / "out")
    assert digests(tmp_path / "one" / "out") == digests(tmp_path / "two" / "out")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["out"]


def test_callbacks_hear_what_the_manifest_says(families, tmp_path):
    listener = Listener()
    manifest = merge(families("vit").content(1.7), tmp_path / "out", listener)
    assert listener.heard == ["begin", "statistics", "end"]
    assert listener.groups == {b.name: tuple(g.tasks for g in b.groups) for b in manifest.blocks}
    (size,) = listener.sizes
    assert (size.algorithm, size.models, size.bytes) == (
        "average",
        manifest.size.models,
        manifest.size.bytes,
    )


def test_the_analysis_is_used_again_until_something_changes(families, tmp_path):
    source = families("llama")
    shutil.copytree(source.base.parent, tmp_path / "models")
    family = Family(tmp_path / "models" / "base", [tmp_path / "models" / task for task in TASKS])
    runs = iter(range(100))

    def measured(*arguments, **parameters) -> bool:
        listener = Listener()
        merge(family.content(*arguments, **parameters), tmp_path / f"out{next(runs)}", listener)
        return "statistics" in listener.heard

    assert measured(2)
    assert not measured(2)
    assert not measured(1.3, "task_arithmetic", linkage="max")
    assert not measured(1, "ties", trim_scope="tensor")
    assert measured(2, granularity="layer")
    assert measured(1.5, "ties", density=0.3)
    assert not measured(1, "ties", density=0.3)
    assert measured(1.5, "ties", density=0.2)
    assert measured(1, "ties", density=0.3, similarity_on="trimmed")
    path = family.tuned[1] / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] += 1
    save_file(state, path, {"format": "pt"})
    assert measured(2)
    assert not measured(2)
    for found in tmp_path.glob("out*/flexmerge_analysis.json"):
        found.write_text(found.read_text()[:-40])
    assert measured(2)


def test_an_analysis_of_other_weights_would_show(families, tmp_path):
    """The one that is reused decides: this is how a stale one would do harm."""
    family = families("llama")
    first = merge(family.content(1.5), tmp_path / "first")
    path = tmp_path / "first" / "flexmerge_analysis.json"
    content = json.loads(path.read_text())
    content["grams"] = {name: torch.eye(3).tolist() for name in content["grams"]}
    path.write_text(json.dumps(content))
    assert merge(family.content(1.5), tmp_path / "second").blocks != first.blocks


PEAK = """
import resource, sys, yaml
import torch, mergekit_ext
from mergekit.options import MergeOptions
from mergekit_ext.host.run import merge
torch.set_num_threads(1)
import transformers.models.llama
mergekit_ext.register()
content = yaml.safe_load(open(sys.argv[1]).read())
for target in (8, 2.5):  # the first run loads what is loaded late
    content["parameters"]["target_size"] = target
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge(yaml.safe_dump(content), f"{sys.argv[2]}/{target}", MergeOptions(quiet=True))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_that_of_one_block(tmp_path):
    """Eight models of 60 MB in 16 layers: a block of all is about 25 MB, everything 480 MB."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config)
    names = ["base", *(f"t{i}" for i in range(8))]
    for number, name in enumerate(names):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * number * torch.rand_like(parameter))
        model.save_pretrained(tmp_path / name)
    size = (tmp_path / "t0" / "model.safetensors").stat().st_size
    assert size > 55e6
    content = small.config(
        "flexmerge",
        [tmp_path / name for name in names[1:]],
        tmp_path / "base",
        {"target_size": 8, "algorithm": "ties"},
    )
    path = small.write_yaml(tmp_path / "m.yml", content)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, path, tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Vectors, task vectors and a result of one MLP: 18 times 3 MB.
    assert int(done.stdout) < 150
