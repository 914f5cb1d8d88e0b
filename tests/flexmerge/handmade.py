"""FlexMerge checkpoints written by hand, from docs/flexmerge-format.md and nothing else.

Slow and obvious, and independent of the package, so that it can be tested with what this writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from tests.models import state

Groups = Sequence[tuple[Sequence[str], str]]


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


def models(
    folder: Path, make: Callable[[], PreTrainedModel], tasks: Sequence[str], dtype: Any = None
) -> tuple[Path, dict[str, Path]]:
    """Save a base, and for each task the base plus noise, with a head of its own."""
    torch.manual_seed(0)
    base = make().to(dtype or torch.float32)
    base.save_pretrained(folder / "base")
    paths = {}
    for index, task in enumerate(tasks):
        model = make().to(dtype or torch.float32)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01 * (index + 1))
        paths[task] = folder / "models" / task
        model.save_pretrained(paths[task])
        (paths[task] / "vocab.txt").write_text(f"words of {task}\n")
    return folder / "base", paths


def block_of(name: str) -> str:
    """Attention and the rest of each layer; everything else is one block."""
    layer = re.search(r"(?:layers?|block)\.(\d+)\.", name)
    if layer is None:
        return "rest"
    return f"layer {layer[1]} {'attention' if 'att' in name.lower() else 'other'}"


def write(
    out: Path,
    base: Path,
    paths: Mapping[str, Path],
    groups: Callable[[str], Groups],
    private: str = "classifier",
    files_per_set: int = 2,
) -> dict[str, dict[str, Tensor]]:
    """Write a checkpoint and return what the tensors of each task must be.

    Args:
        out: a new folder.
        base: the base model's folder.
        paths: the folder of each task's model.
        groups: for a block's name, its groups and the kind of each.
        private: what the names of private tensors hold.
        files_per_set: over how many files the tensors of one kind and set are spread.
    """
    torch.manual_seed(1)
    before, inputs = state(base), {task: state(path) for task, path in paths.items()}
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in (name for name in before if private not in name):
        blocks[block_of(name)].append(name)
    heads = {task: {n: t for n, t in own.items() if private in n} for task, own in inputs.items()}
    expected = {task: dict(own) for task, own in heads.items()}
    places: dict[tuple[str, tuple[str, ...]], dict[str, Tensor]] = defaultdict(dict)
    entries, masked = [], set[str]()
    for block, members in blocks.items():
        described: list[dict[str, Any]] = []
        for tasks, kind in ((tuple(chosen), kind) for chosen, kind in groups(block)):
            described.append(
                {"tasks": tasks, "kind": kind, "similarity": 0.5 if tasks[1:] else None}
            )
            stored = places["dense" if kind == "dense" else "unified", tasks]
            first = inputs[tasks[0]]
            if kind != "masked":
                for name in members:
                    mean = sum(inputs[task][name].double() for task in tasks) / len(tasks)
                    stored[name] = mean.to(first[name].dtype)
                    for task in tasks:
                        expected[task][name] = stored[name]
            if kind == "dense":
                continue
            masked.update(tasks)
            if kind == "residual":
                described[-1]["own"] = own = [n for n in members if before[n].dim() < 2]
                described[-1]["ranks"] = ranks = {task: {} for task in tasks}
                for name in own:
                    del stored[name]
                    for task in tasks:
                        places["dense", (task,)][name] = inputs[task][name]
                        expected[task][name] = inputs[task][name]
                for index, task in enumerate(tasks):
                    # Ranks 3, 2, 1 and 0.
                    for name in members if index < 3 else ():
                        if name in own:
                            continue
                        mean, rank = stored[name], 3 - index
                        columns = mean.numel() // len(mean)
                        b = torch.randn(len(mean), rank).to(mean.dtype)
                        a = torch.randn(rank, columns).mul(0.02).to(mean.dtype)
                        ranks[task][name] = rank
                        factors = places["factors", (task,)]
                        factors[f"{name}.lora_B"], factors[f"{name}.lora_A"] = b, a
                        change = (b.float() @ a.float()).view(mean.shape)
                        expected[task][name] = (mean.float() + change).to(mean.dtype)
                continue
            described[-1]["rescale"] = rescale = {t: 0.5 + i / 4 for i, t in enumerate(tasks)}
            for name in members:
                places["base", ()][name] = before[name]
                stored[name] = first[name] - before[name]
            for task in tasks:
                masks = {name: torch.rand(before[name].shape) < 0.5 for name in members}
                bits = np.concatenate([masks[name].numpy().reshape(-1) for name in members])
                packed = np.packbits(bits, bitorder="little")
                places["masks", (task,)][block] = torch.from_numpy(packed)
                for name in members:
                    change = rescale[task] * (masks[name] * stored[name].float())
                    expected[task][name] = (before[name].float() + change).to(stored[name].dtype)
        entries.append(
            {
                "name": block,
                "kind": "some kind",
                "tensors": _shapes({name: before[name] for name in members}),
                "groups": described,
            }
        )
    for task, own in heads.items():
        places["dense", (task,)].update(own)

    (out / "shards").mkdir(parents=True)
    files = _files(out, places, list(paths), files_per_set)
    stored_bytes, in_heads = _bytes(places), _bytes(heads)
    unit = (_bytes(inputs) - in_heads) // len(paths)
    content = {
        "format": "flexmerge",
        "version": 1,
        "generator": "a test",
        "method": {"algorithm": "average", "parameters": {}},
        "base_model": str(base),
        "size": {
            "models": (stored_bytes - in_heads) / unit,
            "bytes": stored_bytes,
            "unit_bytes": unit,
            "private_bytes": in_heads,
        },
        "tasks": [
            {"name": t, "model": str(path), "ordinary": t not in masked}
            for t, path in paths.items()
        ],
        "files": files,
        "blocks": entries,
        "private": [{"task": task, "tensors": _shapes(own)} for task, own in heads.items()],
    }
    for task, path in paths.items():
        _folder(out, task, path, files, task not in masked)
    beside = [path for task in paths for path in (out / task).rglob("*") if path.is_file()]
    content["task_files"] = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in beside
        if path.suffix != ".safetensors"
    }
    (out / "flexmerge.json").write_text(json.dumps(content))
    return expected


@contextmanager
def edited(out: Path) -> Iterator[dict[str, Any]]:
    """The manifest, to be changed."""
    path = out / "flexmerge.json"
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def described(out: Path, path: str) -> dict[str, Any]:
    """Length and digest of a file as it is now, as a manifest's entry has them."""
    content = (out / path).read_bytes()
    return {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def redescribe(out: Path) -> None:
    """Correct the lengths and digests in the manifest, and the sum of bytes, to what is there."""
    with edited(out) as content:
        for entry in content["files"]:
            entry.update(described(out, entry["path"]))


def _bytes(owners: Mapping[Any, Mapping[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for own in owners.values() for t in own.values())


def _shapes(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(tensor.shape)} for name, tensor in tensors.items()]


def _files(
    out: Path,
    places: Mapping[tuple[str, tuple[str, ...]], dict[str, Tensor]],
    tasks: list[str],
    files_per_set: int,
) -> list[dict[str, Any]]:
    entries = []
    numbers: dict[str, int] = defaultdict(int)
    for (kind, members), tensors in places.items():
        names = list(tensors)
        for part in range(files_per_set):
            chosen = {name: tensors[name] for name in names[part::files_per_set]}
            if not chosen:
                continue
            numbers[kind] += 1
            path = f"shards/{kind}-{numbers[kind]:05}.safetensors"
            save_file(chosen, out / path, metadata={"format": "pt"})
            # Which tasks a file of the base names is not specified: here, all.
            entry = {"kind": kind, "tasks": list(members or tasks)}
            entries.append(described(out, path) | entry)
    return entries


def _folder(out: Path, task: str, path: Path, files: list[dict[str, Any]], ordinary: bool) -> None:
    folder = out / task
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    if not ordinary:
        return
    own = [file for file in files if file["kind"] == "dense" and task in file["tasks"]]
    weight_map = {}
    for index, file in enumerate(own, 1):
        name = f"model-{index:05}-of-{len(own):05}.safetensors"
        os.link(out / file["path"], folder / name)
        header = (folder / name).read_bytes()
        length = int.from_bytes(header[:8], "little")
        keys = json.loads(header[8 : 8 + length])
        weight_map.update({key: name for key in keys if key != "__metadata__"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
