"""Families of small models that are FlexMerged, and what their checkpoints must be."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import mergekit_ext
from mergekit_ext.flexmerge.manifest import Manifest, read_manifest
from mergekit_ext.flexmerge.reader import open_checkpoint
from tests import models as small
from tests.reference import flexmerge as naive

TASKS = ("tuned0", "tuned1", "tuned2")


QUIET = MergeOptions(quiet=True)


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    )


MAKERS = {"llama": small.llama, "bert": small.bert, "vit": vit, "t5": small.t5, "gpt2": gpt2}


@dataclass(frozen=True)
class Family:
    """A base, its fine-tunes, and what is stored of them."""

    base: Path
    tuned: Sequence[Path]

    @property
    def states(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        return small.state(self.base), [small.state(path) for path in self.tuned]

    def content(self, target: object, algorithm: str = "average", **parameters: Any):
        given = {"target_size": target, "algorithm": algorithm, **parameters}
        return small.config("flexmerge", self.tuned, self.base, given)


def made(folder: Path, name: str, dtype: torch.dtype) -> Family:
    base, tuned = small.family(folder, MAKERS[name], dtype)
    if name == "bert":  # a head of another size for every task
        for labels, path in enumerate(tuned, 2):
            model = BertForSequenceClassification.from_pretrained(
                path, num_labels=labels, ignore_mismatched_sizes=True
            )
            model.to(dtype).save_pretrained(path)
    return Family(base, tuned)


def copied(family: Family, folder: Path) -> Family:
    """Copy a family whose files a test changes."""
    shutil.copytree(family.base.parent, folder)
    return Family(folder / "base", [folder / path.name for path in family.tuned])


def merge(content: Mapping[str, Any], out: Path, *callbacks: object, **options: Any) -> Manifest:
    settings = MergeOptions(quiet=True, **options)
    mergekit_ext.merge(yaml.safe_dump(dict(content)), out, settings, callbacks=callbacks)
    return read_manifest(out)


def as_index_says(folder: Path) -> dict[str, Tensor]:
    """A checkpoint as any reader finds it; every tensor is named once and there once."""
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {p.name for p in folder.glob("*.safetensors")} == set(weights.values())
    files = {name: load_file(folder / name) for name in set(weights.values())}
    assert sorted(n for content in files.values() for n in content) == sorted(weights)
    return {name: files[file][name] for name, file in weights.items()}


def on_disk(folder: Path) -> int:
    """Bytes of all weight files, hard links once."""
    files = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*.safetensors")}
    return sum(files.values())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


def cuts_of(manifest: Manifest, base, models, density: float) -> list[float]:
    shared = {t.name: base[t.name] for b in manifest.blocks for t in b.tensors}
    return [naive.least_kept(shared, model, density) for model in models]


def check_blocks(
    out: Path, family: Family, algorithm: str, options: naive.Options, tolerance: float
) -> set[str]:
    """Compare every block of every task with F of its group; return the kinds of groups seen."""
    checkpoint = open_checkpoint(out, verify=True)
    manifest = read_manifest(out)
    base, models = family.states
    place = {task.name: i for i, task in enumerate(manifest.tasks)}
    found = {task: dict(checkpoint.tensors(task)) for task in place}
    for task, tensors in found.items():
        assert tensors.keys() == models[place[task]].keys()
    kinds = set()
    for block in manifest.blocks:
        names = [t.name for t in block.tensors]
        assert sorted(t for group in block.groups for t in group.tasks) == sorted(place)
        for group in block.groups:
            kinds.add(group.kind if len(group.tasks) > 1 else "alone")
            numbers = [place[task] for task in group.tasks]
            if len(numbers) == 1:
                for name in names:
                    assert torch.equal(found[group.tasks[0]][name], models[numbers[0]][name])
                continue
            given = naive.Options(
                options.lam,
                None,
                None if options.densities is None else [options.densities[i] for i in numbers],
                options.scope,
                None if options.cuts is None else [options.cuts[i] for i in numbers],
            )
            like, inputs = (
                [base[n] for n in names],
                [[models[i][n] for n in names] for i in numbers],
            )
            if group.kind == "masked":
                wanted = naive.masked(algorithm, like, inputs, given)
            else:
                wanted = [naive.merged(algorithm, like, inputs, given)] * len(numbers)
            for task, values in zip(group.tasks, wanted, strict=True):
                for name, value in zip(names, values, strict=True):
                    tensor = found[task][name]
                    assert tensor.shape == value.shape
                    limit = tolerance * max([1e-3, *value.abs().flatten().tolist()])
                    gap = max([0.0, *(tensor.double() - value).abs().flatten().tolist()])
                    assert gap <= limit, f"{block.name}: {name} of {task}: {gap}"
    for task in manifest.private:
        for tensor in task.tensors:
            same_value = found[task.task][tensor.name], models[place[task.task]][tensor.name]
            assert torch.equal(*same_value)
    return kinds


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    state = change(dict(state))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def tied_family(folder: Path, twice: Sequence[str]) -> Family:
    """Llamas with one matrix for input and output; those of `twice` store it under both names."""

    def tied() -> PreTrainedModel:
        config = small.llama().config
        config.tie_word_embeddings = True
        return transformers.LlamaForCausalLM(config)

    base, tuned = small.family(folder, tied)
    for name in twice:
        rewrite(
            folder / name,
            lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()},
        )
    return Family(base, tuned)


def digests(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "flexmerge_analysis.json")
    }
