"""FlexMerges as they are run: commands, plain loaders, what is left behind, what is used again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.events import MergeCallback
from mergekit_ext.flexmerge.manifest import read_manifest
from tests import models as small
from tests.host.flexmerge_models import (
    MAKERS,
    TASKS,
    Family,
    as_index_says,
    copied,
    digests,
    merge,
    rewrite,
)


def logits(folder: Path) -> Tensor:
    """What plain transformers computes; it finds all that it needs, and nothing else."""
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    if hasattr(config, "patch_size"):
        given = {"pixel_values": torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)}
    else:
        ids = torch.arange(2, 12).reshape(1, 10)
        given = {"input_ids": ids}
        if config.is_encoder_decoder:
            given["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        return model.eval()(**given).logits


@pytest.mark.parametrize("name", MAKERS)
def test_plain_transformers_loads_every_task(name, families, tmp_path):
    """Each task computes what the expected model does."""
    family, out = families(name), tmp_path / "out"
    merge(family.content(2), out)
    base, models = family.states
    manifest = read_manifest(out)
    found = []
    for number, task in enumerate(TASKS):
        expected = tmp_path / f"{task}-expected"
        shutil.copytree(family.tuned[number], expected)
        state = dict(models[number])
        for block in manifest.blocks:
            (group,) = [g for g in block.groups if task in g.tasks]
            for tensor in block.tensors:
                members = [models[TASKS.index(t)][tensor.name].double() for t in group.tasks]
                mean = sum(members) / len(members)
                state[tensor.name] = mean.to(base[tensor.name].dtype).contiguous()
        save_file(state, expected / "model.safetensors", {"format": "pt"})
        found.append(logits(out / task))
        assert torch.allclose(found[-1], logits(expected), rtol=1e-4, atol=1e-5)
    # And they are not all the same model.
    assert found[0].shape != found[1].shape or not torch.allclose(found[0], found[1])
    if not manifest.private:
        merge(family.content(1), tmp_path / "one")
        assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "one" / "tuned0"))


def test_stock_mergekit_yaml_and_our_command_write_the_same(families, tmp_path):
    config = small.write_yaml(tmp_path / "m.yml", families("llama").content(1.7, "ties"))
    stock = small.command_here("mergekit-yaml", config, tmp_path / "stock", "--quiet")
    assert stock.returncode == 0, stock.stderr
    ours = small.command_here("mergekit-ext", "merge", config, tmp_path / "ours", "--quiet")
    assert ours.returncode == 0, ours.stderr
    wanted = digests(tmp_path / "stock")
    assert digests(tmp_path / "ours") == wanted
    merge(yaml.safe_load(config.read_text()), tmp_path / "called")
    # The text of the configuration was not the same.
    assert digests(tmp_path / "called").items() ^ wanted.items() == {
        ("mergekit_config.yml", digests(tmp_path / name)["mergekit_config.yml"])
        for name in ("called", "stock")
    }
    readme = (tmp_path / "stock" / "README.md").read_text()
    assert "flexmerge" in readme.lower()
    assert re.search(r"1\.\d+", readme)


def test_runs_are_alike_and_seeds_are_not(families, tmp_path):
    content = families("llama").content(1.8, "average", order="random", dare_density=0.5)
    outs = []
    for number, seed in enumerate((1, 1, 2)):
        merge(content, tmp_path / str(number), random_seed=seed)
        outs.append({k: v for k, v in digests(tmp_path / str(number)).items() if "shards" in k})
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]


@pytest.mark.parametrize("place", ["base", "tuned1"])
def test_a_value_that_is_not_finite(place, families, tmp_path):
    family = copied(families("llama"), tmp_path / "models")

    def spoil(state):
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        return state

    rewrite(tmp_path / "models" / place, spoil)
    with pytest.raises(NonFiniteError) as caught:
        merge(family.content(1.5), tmp_path / "out" / "deep")
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"
    assert caught.value.model == ("the base model" if place == "base" else "tuned1")
    assert not list(tmp_path.glob("out/*"))


def test_a_merged_value_that_leaves_the_range(tmp_path):
    base, tuned = small.family(tmp_path, small.llama, torch.float16)
    for folder in tuned:
        rewrite(folder, lambda state: {**state, "lm_head.weight": torch.full((64, 32), 6e4).half()})
    with pytest.raises(MergeError, match=r"lm_head\.weight.*float16"):
        merge(Family(base, tuned).content(1, "task_arithmetic"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", *TASKS]


class Listener(MergeCallback):
    def __init__(self, stop_at: int | None = None, error: BaseException | None = None):
        self.heard, self.groups, self.sizes = [], {}, []
        self.stop_at, self.error = stop_at, error

    def on_merge_begin(self, event):
        self.heard.append("begin")

    def on_statistics_begin(self, event):
        self.heard.append("statistics")

    def on_block_merged(self, event):
        self.groups[event.name] = event.groups
        if len(self.groups) == self.stop_at:
            raise self.error

    def on_size_reached(self, event):
        self.sizes.append(event)

    def on_merge_end(self, event):
        self.heard.append("end")


def test_an_exception_in_the_middle(families, tmp_path):
    family, out = families("llama"), tmp_path / "out"
    for folder in ("new", "empty"):
        if folder == "empty":
            out.mkdir()
        with pytest.raises(RuntimeError, match="enough"):
            merge(family.content(1.5), out, Listener(7, RuntimeError("enough")))
        assert not list(tmp_path.glob("out/*"))
        assert not list(tmp_path.glob(".*"))
    merge(family.content(1.5), out)
    assert as_index_says(out / "tuned0")


def test_after_an_interrupt_another_configuration_takes_what_still_holds(families, tmp_path):
    """The analysis and untouched blocks are used again, the others are not."""
    family = families("llama")
    heard = []
    for name, target in (("average", 1.6), ("task_arithmetic", 1.3), ("task_arithmetic", 1.3)):
        listener = Listener(5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(family.content(target, name), tmp_path / "one" / "out", listener)
        assert not (tmp_path / "one" / "out").exists()
        heard.append(listener.heard)
    assert heard[0] == ["begin", "statistics"]
    (staged,) = (tmp_path / "one").iterdir()
    journals = [path.read_text() for path in sorted(staged.glob("journal-*-0.lines"))]
    assert len(journals) == 2  # the third run had nothing to note
    lines = [json.loads(line[9:]) for text in journals for line in text.splitlines()]
    measured = [key for kind, key, _ in lines if kind == "gram"]
    assert len(measured) == len(set(measured)) > 5
    blocks = [key for kind, key, _ in lines if kind == "piece"]
    assert len(blocks) == 10  # five by each algorithm; the third run found those of the second
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
    assert size.algorithm == "average"
    assert (size.models, size.bytes) == (manifest.size.models, manifest.size.bytes)


def test_the_analysis_is_used_again_until_something_changes(families, tmp_path):
    family = copied(families("llama"), tmp_path / "models")
    runs = iter(range(100))

    def measured(*arguments, **parameters) -> bool:
        listener = Listener()
        merge(family.content(*arguments, **parameters), tmp_path / f"out{next(runs)}", listener)
        return "statistics" in listener.heard

    assert measured(2)
    assert not measured(1.3, "task_arithmetic", linkage="max")
    assert not measured(1, "ties", trim_scope="tensor")
    assert measured(2, granularity="layer")
    assert measured(1.5, "ties", density=0.3)
    assert not measured(1, "ties", density=0.3)
    assert measured(1.5, "ties", density=0.2)
    assert measured(1, "ties", density=0.3, similarity_on="trimmed")
    rewrite(family.tuned[1], lambda s: {**s, "lm_head.weight": s["lm_head.weight"] + 1})
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
