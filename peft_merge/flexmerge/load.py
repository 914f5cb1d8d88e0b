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
from torch import Tensor, nn

from mergekit_ext.errors import (
    CheckpointError,
    ConfigError,
    MergekitExtError,
    Problem,
    listing,
    shown,
)
from peft_merge.adapter import Adapter, LoraAdapter, ModuleInfo
from peft_merge.flexmerge.family import of_the_base
from peft_merge.flexmerge.result import Group, Manifest, open_manifest
from peft_merge.io import load_adapter
from peft_merge.io.names import Targets, module_to_save, unwrapped
from peft_merge.live import add_adapter, fill
from peft_merge.matching import Shape, orientations

# Where PEFT's layers keep what is loaded of one adapter.
_CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "ia3_l")
_SUBJECT = "loading these tasks"
_BASE = "Load the model that the adapters were trained on, with the class that they were."
_DAMAGED = "Copy or download the folder again."


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
    _require_base(base_model)
    folder = Path(path).expanduser()
    manifest = open_manifest(folder, verify=verify)
    adapters = [load_adapter(folder / task.name, name=task.name) for task in manifest.tasks]
    if problems := [*_other_kinds(manifest, adapters), *_not_shared(manifest, adapters)]:
        raise CheckpointError(problems, str(folder))
    if problems := list(_inseparable(adapters)):
        raise ConfigError(problems, "loading these tasks together")
    if problems := [p for adapter in adapters for p in _misfits(adapter, base_model)]:
        raise ConfigError(problems, _SUBJECT)
    with _restored_on_error(base_model):
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
        for group in _groups(manifest):
            owner = group.tasks[0]
            if adapter.name in group.tasks and adapter.name != owner:
                for module in group.modules:
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


def _share(model: Any, module: str, owner: str, task: str) -> None:
    """Let `task` use the parameters of `owner` in one layer."""
    layer = model.base_model.model.get_submodule(module)
    for name in _CONTAINERS:
        held = getattr(layer, name, None)
        if held is None or owner not in held:
            continue
        if isinstance(held, nn.ParameterDict):
            held[task] = held[owner]
        else:
            for leaf, parameter in held[owner].named_parameters(recurse=False):
                setattr(held[task], leaf, parameter)


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


def _other_kinds(manifest: Manifest, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    found = {"lora" if isinstance(adapter, LoraAdapter) else "ia3" for adapter in adapters}
    if found != {manifest.kind}:
        yield Problem("kind", f"adapters of {' and '.join(found)}", manifest.kind, _DAMAGED)


def _not_shared(manifest: Manifest, adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield what the manifest calls shared and is not in all members, with the same values."""
    by_name = {adapter.name: adapter for adapter in adapters}
    for group in _groups(manifest):
        members = [by_name[task] for task in group.tasks]
        for module in group.modules:
            if not _same(members, module):
                found = f"changes that differ between {', '.join(group.tasks)}"
                yield Problem(module, found, "the same in all of them", _DAMAGED)


def _same(adapters: Sequence[Adapter], module: str) -> bool:
    infos = {adapter.infos.get(module) for adapter in adapters}
    if None in infos or len(infos) != 1:
        return False
    first, *others = (_tensors(adapter, module) for adapter in adapters)
    return all(len(first) == len(other) and all(map(torch.equal, first, other)) for other in others)


def _tensors(adapter: Adapter, module: str) -> list[Tensor]:
    value: Any = adapter.load(module)
    if isinstance(value, Tensor):
        return [value]
    return [part for part in (value.a, value.b, value.bias) if part is not None]


def _inseparable(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield what replaces tensors of the base, which PEFT has once, and is not the same in all."""
    common = of_the_base(adapters)
    remedy = "Load this task's folder by itself with PeftModel.from_pretrained."
    for adapter in adapters:
        if adapter.config.get("ensure_weight_tying") and len(adapters) > 1:
            expected = "false: PEFT finds tied layers for the first adapter of a model only"
            yield Problem(f"{adapter.name}: ensure_weight_tying", "true", expected, remedy)
        tensors = sorted(adapter.saved.keys() - _apart(adapter).saved.keys() - common)
        if tensors:
            found = "tensors of the base, which this task alone replaces"
            expected = "factors, vectors and `modules_to_save`, which PEFT keeps apart"
            yield Problem(f"{adapter.name}: {listing(tensors)}", found, expected, remedy)


def _require_base(base_model: Any) -> None:
    """Raise `TypeError` for what is no model, `ConfigError` for a model that has adapters."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(base_model, nn.Module):
        raise TypeError(
            f"base_model: found {type(base_model).__name__}; expected the model itself, as "
            "from_pretrained of transformers loads it."
        )
    layers = (isinstance(module, BaseTunerLayer) for module in base_model.modules())
    if isinstance(base_model, PeftModel) or any(layers):
        found, remedy = "a model that has adapters already", "Pass the base model."
        raise ConfigError([Problem("base_model", found, "one without", remedy)], _SUBJECT)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Undo what PEFT did to a model if it fails: a module that was wrapped is itself again.

    Raises:
        ConfigError: for an error that is not the project's own.
    """
    children = [(each, dict(each._modules), each.training) for each in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = dict(vars(model))
    try:
        yield
    except BaseException as error:
        for module, before, training in children:
            module._modules.clear()
            module._modules.update(before)
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for name in vars(model).keys() - own.keys():
            del vars(model)[name]
        vars(model).update(own)
        if isinstance(error, MergekitExtError) or not isinstance(error, Exception):
            raise
        reason = (str(error).splitlines() or [""])[0]
        found = f"a model that PEFT does not take ({type(error).__name__}: {reason})"
        problem = Problem("base_model", found, "the base of these adapters", _BASE)
        raise ConfigError([problem], _SUBJECT) from error


def _misfits(adapter: Adapter, model: nn.Module) -> Iterator[Problem]:
    """Compare names and shapes of all that an adapter changes or replaces with a model's."""
    config = adapter.config
    if config.get("layer_replication") or config.get("ensure_weight_tying"):
        return  # Replicated and tied layers have names that only PEFT knows.
    modules = dict(model.named_modules())
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held.update(model.named_buffers(remove_duplicate=False))
    found = (
        ("adapted modules", "modules", *_adapted(adapter, modules)),
        ("whole tensors", "tensors", *_replaced(adapter, held)),
    )
    where = f"adapter {adapter.name}"
    for what, kind, missing, others in found:
        if missing:
            lacking = f"{what} that the model lacks: {listing(missing)}"
            yield Problem(where, lacking, f"{kind} of the model", _BASE)
        if others:
            unlike = f"{what} of another shape: {listing(others, 2)}"
            yield Problem(where, unlike, "the shapes of the model", _BASE)


def _adapted(adapter: Adapter, modules: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Return adapted modules that the model lacks, and those of another shape."""
    missing, others = [], []
    targets = Targets(adapter.config)
    for name, info in adapter.infos.items():
        module = modules.get(name, modules.get(unwrapped(name)))
        if module is None:
            missing.append(name)
            continue
        shapes = _shapes(adapter, targets, unwrapped(name), module)
        if shapes and not any(_fits(info, shape, module) for shape in shapes):
            weights = " or ".join(str(list(shape)) for shape in shapes)
            others.append(f"{name} (a change of {list(info.shape)}, a weight of {weights})")
    return missing, others


def _shapes(adapter: Adapter, targets: Targets, owner: str, module: nn.Module) -> list[Shape]:
    """Return the shapes that an adapted weight may have; none where packed weights hide them."""
    info = adapter.infos.get(owner)
    if isinstance(info, ModuleInfo) and info.layout == "convolution" and info.matrices > 1:
        return []  # of groups, in factors that are not
    leaves = targets.parameters(owner) or ["weight", "in_proj_weight"]
    weights = [getattr(module, leaf, None) for leaf in leaves]
    found = [
        tuple(weight.shape)
        for weight in weights
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() > 1
    ]
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if found or not all(isinstance(size, int) for size in sizes):
        return list(found)
    return [sizes]  # type: ignore[list-item]


def _fits(info: Any, shape: Shape, module: nn.Module) -> bool:
    ways = orientations(info, shape)
    return False in ways if isinstance(module, nn.Linear) else bool(ways)


def _replaced(adapter: Adapter, held: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return whole tensors (heads, embeddings) that the model lacks, and of another shape."""
    missing = [name for name in adapter.saved if name not in held]
    others = []
    for name in sorted(adapter.saved.keys() & held.keys()):
        shape, own = list(adapter.saved[name]().shape), list(held[name].shape)
        packed = len(shape) != len(own)
        if shape != own and not packed:
            others.append(f"{name} ({shape}, in the model {own})")
    return missing, others
