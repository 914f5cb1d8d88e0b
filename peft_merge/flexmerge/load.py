"""All tasks of a FlexMerge on one base model, with shared tensors."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ext.errors import (
    CheckpointError,
    ConfigError,
    MergekitExtError,
    Problem,
    listing,
    one_line,
    require,
    shown,
)
from mergekit_ext.flexmerge.manifest import FILE_NAME
from mergekit_ext.io.documents import StrPath
from mergekit_ext.io.hub import folder_of
from peft_merge.adapter import Adapter, LoraAdapter
from peft_merge.flexmerge.family import of_the_base
from peft_merge.flexmerge.manifest import Group, open_manifest
from peft_merge.io.names import PREFIX, module_to_save, stored
from peft_merge.io.read import CONFIG, SAFETENSORS, load_adapter
from peft_merge.live import BASE, add_adapter, fill, require_places

# Where PEFT's layers keep what is loaded of one adapter.
_CONTAINERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "ia3_l")
_SUBJECT = "loading these tasks"
_DAMAGED = "Copy or download the folder again."


def load_tasks(
    base_model: Any, path: StrPath, *, verify: bool = True, revision: str | None = None
) -> Any:
    """Put all adapters of a FlexMerge on one base model; what tasks share is one parameter.

    Factors and vectors keep their stored dtypes; together they have the manifest's size. Sharing
    outlasts ``model.to(...)``. The first task is active; ``model.set_adapter(task)`` changes it,
    and for LoRA ``model(..., adapter_names=[task of each row])`` runs rows of several tasks in one
    batch, as PEFT supports it. The model is in evaluation mode and meant for inference: training
    one task would change the others.

    Args:
        base_model: whose modules PEFT wraps, as ``PeftModel.from_pretrained`` does.
        path: the folder of a FlexMerge, or its name on the Hub.
        verify: compare files with their digests first.
        revision: branch, tag or commit on the Hub.

    Returns:
        a PeftModel with one adapter for each task.

    Raises:
        CheckpointError: the folder is not as docs/adapters-flexmerge.md says.
        ConfigError: adapters that PEFT cannot hold side by side (each folder loads by itself), or
            a base that they do not fit or that has adapters. The base is as it was.
        TypeError: `base_model` is no model.

    Example:
        >>> model = peft_merge.load_tasks(base_model, "out")
        >>> model.set_adapter("maths")
    """
    require_base(base_model)
    folder = folder_of(path, revision, [FILE_NAME, f"*/{CONFIG}", f"*/{SAFETENSORS}"])
    manifest = open_manifest(folder, verify=verify)
    adapters = [load_adapter(folder / task.name, name=task.name) for task in manifest.tasks]
    shared = [group for block in manifest.blocks for group in block.groups if len(group.tasks) > 1]
    problems = list(_not_shared(shared, adapters))
    kinds = {"lora" if isinstance(adapter, LoraAdapter) else "ia3" for adapter in adapters}
    if kinds != {manifest.kind}:
        problems.append(Problem("kind", manifest.kind, "that of the adapters", _DAMAGED))
    require(problems, str(folder), CheckpointError)
    own = base_model.state_dict()
    adapters = [_without_copies(adapter, own) for adapter in adapters]
    require(_inseparable(adapters), _SUBJECT)
    return put_on(base_model, adapters, shared)


def put_on(base_model: Any, adapters: Sequence[Adapter], shared: Sequence[Group] = ()) -> Any:
    """Return a PeftModel with these adapters, the first of which is active.

    Its base is a copy of `base_model` with the same tensors, which PEFT may wrap and freeze.

    Raises:
        ConfigError: the base is not that of the adapters.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
    from peft.utils import ModulesToSaveWrapper

    tensors = base_model.state_dict(keep_vars=True).values()
    first, *others = adapters
    try:
        base = copy.deepcopy(base_model, {id(tensor): copy.copy(tensor) for tensor in tensors})
        config = PeftConfig.from_peft_type(**first.config)
        wrapped = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        model = wrapped(base, config, first.name, autocast_adapter_dtype=False)
        fill(model, first.name, _apart(first))
        for adapter in others:
            add_adapter(model, adapter.name, _apart(adapter))
            for group in shared:
                if adapter.name in group.tasks[1:]:
                    for module in group.modules:
                        _share(model, module, group.tasks[0], adapter.name)
        of_base = {
            f"{PREFIX}{stored(name, first.infos)}": load()
            for name, load in first.saved.items()
            if module_to_save(name, first.config) is None
        }
        places = model.state_dict()
        require_places(first.name, of_base, places)
        for name, tensor in of_base.items():  # not into the tensors of the base
            model.get_parameter(name).data = tensor.to(places[name])
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                # Adapters without it have the base's, which PEFT's mixed batches ask for by task.
                for name in model.peft_config.keys() - module.modules_to_save.keys():
                    module.modules_to_save[name] = module.original_module
                    module.update(name)
        model.set_adapter(first.name)
        model.requires_grad_(False)
        if not isinstance(first, LoraAdapter):
            # PEFT would take `adapter_names` without a word, and use the active task for all rows.
            model.base_model._enable_peft_forward_hooks = _one_task_at_a_time
        return model.eval()
    except MergekitExtError:
        raise
    except Exception as error:
        found = f"a model that PEFT does not take ({one_line(error)})"
        problem = Problem("base_model", found, "the base of these adapters", BASE)
        raise ConfigError([problem], _SUBJECT) from error


@contextmanager
def _one_task_at_a_time(*_: Any, adapter_names: Any = None, **__: Any) -> Iterator[None]:
    if adapter_names is not None:
        raise ValueError(
            f"adapter_names: found {shown(adapter_names)}; expected nothing: PEFT has no batches "
            "of several tasks for (IA)^3. Give each task its own after model.set_adapter(task)."
        )
    yield


def _share(model: Any, module: str, owner: str, task: str) -> None:
    """Let `task` use the parameters of `owner` in one layer."""
    layer = model.base_model.model.get_submodule(module)
    for name in _CONTAINERS:
        held = getattr(layer, name, {})
        if owner in held:
            held[task] = held[owner]


def _apart(adapter: Adapter) -> Adapter:
    """Return the adapter without what replaces tensors of the base."""
    own = (name for name in adapter.saved if module_to_save(name, adapter.config) is not None)
    return replace(adapter, saved={name: adapter.saved[name] for name in own})


def _without_copies(adapter: Adapter, base: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter without tensors of the base, which PEFT saves beside LoRAs of embeddings.

    They replace nothing; a trained one does.
    """

    def is_copy(name: str) -> bool:
        own = base.get(name)
        if own is None or own.is_meta or module_to_save(name, adapter.config) is not None:
            return False
        return torch.equal(own, adapter.saved[name]().to(own))

    kept = {name: load for name, load in adapter.saved.items() if not is_copy(name)}
    return replace(adapter, saved=kept)


def _not_shared(groups: Sequence[Group], adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield what the manifest calls shared and is not in all members, with the same values."""
    by_name = {adapter.name: adapter for adapter in adapters}
    for group in groups:
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


def require_base(base_model: Any) -> None:
    """Raise `TypeError` for what is no model, `ConfigError` for one that cannot be wrapped."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(base_model, nn.Module):
        found = type(base_model).__name__
        raise TypeError(f"base_model: found {found}; expected a model as from_pretrained loads it.")
    layers = (isinstance(module, BaseTunerLayer) for module in base_model.modules())
    if isinstance(base_model, PeftModel) or any(layers):
        found, remedy = "a model that has adapters already", "Pass the base model."
        raise ConfigError([Problem("base_model", found, "one without", remedy)], _SUBJECT)
    if any(parameter.is_meta for parameter in base_model.parameters()):
        found, remedy = "parameters that are offloaded", "Load it without offloading."
        raise ConfigError([Problem("base_model", found, "all in memory", remedy)], _SUBJECT)
