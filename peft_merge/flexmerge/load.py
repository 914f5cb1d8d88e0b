"""All tasks of a FlexMerge on one base model, with shared tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.errors import CheckpointError, ConfigError, Problem, listing, shown
from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.flexmerge.family import of_the_base
from peft_merge.flexmerge.fit import require_base, require_fit, restored_on_error
from peft_merge.flexmerge.manifest import Group, Manifest, open_manifest
from peft_merge.io import load_adapter
from peft_merge.io.names import module_to_save
from peft_merge.live import add_adapter, fill

# Where PEFT's layers keep what is loaded of one adapter.
_CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "ia3_l")


def load_tasks(base_model: Any, path: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Put all adapters of a FlexMerge on one base model; what tasks share is one parameter.

    Factors and vectors keep their stored dtypes; together they have the manifest's size. Sharing
    outlasts ``model.to(...)``. The first task is active; ``model.set_adapter(task)`` changes it,
    and for LoRA ``model(..., adapter_names=[task of each row])`` runs rows of several tasks in one
    batch, as PEFT supports it. The model is in evaluation mode and meant for inference: training
    one task would change the others.

    Args:
        base_model: whose modules PEFT wraps, as ``PeftModel.from_pretrained`` does.
        path: the folder of a FlexMerge.
        verify: compare files with their digests first.

    Returns:
        a PeftModel with one adapter for each task.

    Raises:
        CheckpointError: the folder is not as docs/adapters-flexmerge.md says.
        ConfigError: adapters that PEFT cannot hold side by side (each folder loads by itself), or
            a base that they do not fit or that has adapters. The base is as it was.
        TypeError: `base_model` is no model.
    """
    require_base(base_model)
    folder = Path(path).expanduser()
    manifest = open_manifest(folder, verify=verify)
    adapters = [load_adapter(folder / task.name, name=task.name) for task in manifest.tasks]
    _require_kind(manifest, adapters, folder)
    _require_separable(adapters)
    _require_sharing(manifest, adapters, folder)
    require_fit(adapters, base_model)
    with restored_on_error(base_model):
        return _loaded(base_model, manifest, adapters, folder)


def _loaded(base_model: Any, manifest: Manifest, adapters: Sequence[Adapter], folder: Path) -> Any:
    from peft import PeftModel

    first = manifest.tasks[0].name
    with warnings.catch_warnings():
        # of layers that the base has and the adapter's file has not
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(
            base_model, folder / first, adapter_name=first, autocast_adapter_dtype=False
        )
    # PEFT has rounded its factors to the dtype of the base.
    fill(model, first, _apart(adapters[0]))
    for adapter in adapters[1:]:
        add_adapter(model, adapter.name, _apart(adapter))
        for module, owner in _owners(manifest, adapter.name):
            _share(model, module, owner, adapter.name)
    model.set_adapter(first)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if manifest.kind == "ia3":
        # PEFT would take `adapter_names` without a word, and use the active task for all rows.
        model.base_model._enable_peft_forward_hooks = _one_task_at_a_time
    return model.eval()


@contextmanager
def _one_task_at_a_time(*_: Any, adapter_names: Any = None, **__: Any) -> Iterator[None]:
    if adapter_names is not None:
        raise ValueError(
            f"adapter_names: found {shown(adapter_names)}; expected nothing: PEFT has no batches "
            "of several tasks for (IA)^3. Give each task a batch of its own after "
            "model.set_adapter(task)."
        )
    yield


def _require_kind(manifest: Manifest, adapters: Sequence[Adapter], folder: Path) -> None:
    found = {"lora" if isinstance(adapter, LoraAdapter) else "ia3" for adapter in adapters}
    if found != {manifest.kind}:
        remedy = "Copy or download the folder again."
        problem = Problem("kind", f"adapters of {' and '.join(found)}", manifest.kind, remedy)
        raise CheckpointError([problem], str(folder))


def _require_separable(adapters: Sequence[Adapter]) -> None:
    """Check that what replaces tensors of the base, which PEFT has once, is the same in all."""
    common = of_the_base(adapters)
    problems = []
    for adapter in adapters:
        if adapter.config.get("ensure_weight_tying") and len(adapters) > 1:
            problems.append(
                Problem(
                    f"{adapter.name}: ensure_weight_tying",
                    "true",
                    "false: PEFT finds tied layers for the first adapter of a model only",
                    "Load this task's folder by itself with PeftModel.from_pretrained.",
                )
            )
        tensors = sorted(adapter.saved.keys() - _apart(adapter).saved.keys() - common)
        if tensors:
            problems.append(
                Problem(
                    f"{adapter.name}: {listing(tensors)}",
                    "tensors of the base, which this task alone replaces",
                    "factors, vectors and `modules_to_save`, which PEFT keeps apart",
                    "Load this task's folder by itself with PeftModel.from_pretrained.",
                )
            )
    if problems:
        raise ConfigError(problems, "loading these tasks together")


def _apart(adapter: Adapter) -> Adapter:
    """Return the adapter without what replaces tensors of the base."""
    saved = {
        name: load
        for name, load in adapter.saved.items()
        if module_to_save(name, adapter.config) is not None
    }
    return replace(adapter, saved=saved)


def _groups(manifest: Manifest) -> Iterator[Group]:
    return (group for block in manifest.blocks for group in block.groups if len(group.tasks) > 1)


def _owners(manifest: Manifest, task: str) -> Iterator[tuple[str, str]]:
    """Yield the shared modules of a task, and the first task that has each."""
    for group in _groups(manifest):
        if task in group.tasks and task != group.tasks[0]:
            for module in group.modules:
                yield module, group.tasks[0]


def _require_sharing(manifest: Manifest, adapters: Sequence[Adapter], folder: Path) -> None:
    """Check that what the manifest calls shared is in all members, with the same values."""
    by_name: Mapping[str, Adapter] = {adapter.name: adapter for adapter in adapters}
    problems = []
    for group in _groups(manifest):
        for module in group.modules:
            members = [by_name[task] for task in group.tasks]
            if not _same(members, module):
                found = f"changes that differ between {', '.join(group.tasks)}"
                remedy = "Copy or download the folder again."
                problems.append(Problem(module, found, "the same in all of them", remedy))
    if problems:
        raise CheckpointError(problems, str(folder))


def _same(adapters: Sequence[Adapter], module: str) -> bool:
    if len({adapter.infos.get(module) for adapter in adapters} - {None}) != 1:
        return False
    if not all(module in adapter.infos for adapter in adapters):
        return False
    first, *others = (_tensors(adapter, module) for adapter in adapters)
    return all(len(first) == len(other) and all(map(torch.equal, first, other)) for other in others)


def _tensors(adapter: Adapter, module: str) -> list[torch.Tensor]:
    value: Any = adapter.load(module)
    if isinstance(value, torch.Tensor):
        return [value]
    return [part for part in (value.a, value.b, value.bias) if part is not None]


def _share(model: Any, module: str, owner: str, task: str) -> None:
    """Let `task` use the parameters of `owner` in one layer."""
    layer = model.base_model.model.get_submodule(module)
    for name in _CONTAINERS:
        held = getattr(layer, name, None)
        if held is None or owner not in held:
            continue
        if isinstance(held, torch.nn.ParameterDict):
            held[task] = held[owner]
        else:
            for leaf, parameter in held[owner].named_parameters(recurse=False):
                setattr(held[task], leaf, parameter)
