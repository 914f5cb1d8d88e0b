"""Where the modules of several tasks go when one device does not hold them: with accelerate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.outline import Outline, prefixes
from mergekit_ext.flexmerge.reader import TaskTensors

AUTO, CPU, DISK = "auto", "cpu", "disk"
Device: TypeAlias = int | str | torch.device
DeviceMap: TypeAlias = str | Mapping[str, Device]
MaxMemory: TypeAlias = Mapping[int | str, int | str]
_Plan: TypeAlias = Mapping[str, Device]

_WEIGHT = "weight"
_SUBJECT = "placing these models"


def place(
    modules: Mapping[str, Any],
    tensors: Mapping[str, TaskTensors],
    device_map: DeviceMap,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
) -> None:
    """Spread modules over devices, the CPU and the disk; what tasks share goes to one place, once.

    Args:
        modules: each task's, on the CPU, sharing their tensors.
        tensors: the checkpoint's, of each task.
        device_map: see `mergekit_ext.flexmerge.load`.
        max_memory: likewise.
        offload_folder: likewise.

    Raises:
        ConfigError: the modules cannot be placed so.
    """
    from accelerate import dispatch_model

    outline = Outline(modules)
    if device_map == AUTO:
        plan = _inferred(outline.module, modules, max_memory)
    else:
        plan = _given(device_map, max_memory, outline)
    plans = {task: outline.devices_of(task, plan) for task in modules}
    main = next((device for device in plan.values() if device not in (CPU, DISK)), CPU)
    disk = _Disk(offload_folder)
    for task, module in modules.items():
        disk.add(task, _on_disk(module, plans[task]), tensors[task])
    disk.fill()
    moved: dict[object, tuple[Tensor, Tensor]] = {}
    for task, module in modules.items():
        _move(module, plans[task], moved)
        devices = set(plans[task].values())
        if len(devices) == 1 and DISK not in devices:
            module.hf_device_map = plans[task]  # where accelerate notes it
            continue
        dispatch_model(
            module,
            plans[task],
            main_device=main,
            offload_index=disk.indices[task] or None,
            skip_keys=getattr(module, "_skip_keys_device_placement", None),
        )


def _inferred(outline: Any, modules: Mapping[str, Any], max_memory: MaxMemory | None) -> _Plan:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = {name for module in modules.values() for name in module._no_split_modules or ()}
    try:
        memory = get_balanced_memory(
            outline,
            None if max_memory is None else dict(max_memory),
            no_split_module_classes=sorted(whole),
        )
        return infer_auto_device_map(outline, memory, no_split_module_classes=sorted(whole))
    except ValueError as error:
        expected = "bytes, or sizes such as '20GB', of 0, 1, ... (GPUs) and 'cpu'"
        problem = Problem("max_memory", f"{max_memory} ({error})", expected)
        raise ConfigError([problem], _SUBJECT) from None


def _given(device_map: DeviceMap, max_memory: MaxMemory | None, outline: Outline) -> _Plan:
    if not isinstance(device_map, Mapping):
        expected = f"{AUTO!r}, or a mapping from parts of the models to devices"
        raise ConfigError([Problem("device_map", repr(device_map), expected)], _SUBJECT)
    problems = []
    if max_memory is not None:
        remedy = "Leave it out: a mapping says where everything goes."
        problems.append(Problem("max_memory", "it", f"it with device_map={AUTO!r} only", remedy))
    known = {part for names in outline.names.values() for name in names for part in prefixes(name)}
    for part, device in device_map.items():
        where = f"device_map[{part!r}]"
        if part not in known:
            parts = ", ".join(sorted(name for name in known if name and "." not in name))
            expected = f"a part of the models, such as {parts}, or '' for all"
            problems.append(Problem(where, "no such part", expected))
        if not _is_here(device):
            problems.append(Problem(where, repr(device), f"{CPU}, {DISK} or a device that is here"))
    tensors = {name for names in outline.names.values() for name in names}
    left = sorted(n for n in tensors if not any(part in device_map for part in prefixes(n)))
    if left:
        found = f"no place for {left[0]}" + (f" and {len(left) - 1} others" if left[1:] else "")
        problems.append(Problem("device_map", found, "one for every tensor", "Add '': 'cpu'."))
    if problems:
        raise ConfigError(problems, _SUBJECT)
    return dict(device_map)


def _is_here(device: Device) -> bool:
    if device in (CPU, DISK):
        return True
    try:
        torch.empty(0, device=device)
    # torch has several errors for devices that are not there.
    except (RuntimeError, AssertionError, TypeError, ValueError):
        return False
    return True


def _on_disk(module: Any, plan: _Plan) -> dict[str, Tensor]:
    """accelerate leaves buffers where the work is done."""
    held = module.named_parameters(remove_duplicate=False)
    return {name: tensor.data for name, tensor in held if _device_of(name, plan) == DISK}


def _move(module: Any, plan: _Plan, moved: dict[object, tuple[Tensor, Tensor]]) -> None:
    """Put the tensors of other devices there, unless an earlier module has."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        device = _device_of(name, plan)
        if device in (CPU, DISK):
            continue
        key = (*_range(tensor), device)
        if key not in moved:
            # The tensor on the CPU is kept with the moved one: its address must not be given away.
            moved[key] = tensor.data, tensor.data.to(device)
        tensor.data = moved[key][1]


def _device_of(name: str, plan: _Plan) -> Device:
    return next(plan[part] for part in prefixes(name) if part in plan)


def _range(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _Disk:
    """Where tensors are read from when they are needed: from the checkpoint's own files if these
    hold them as they are, or else from files in the user's folder."""

    def __init__(self, folder: str | os.PathLike[str] | None):
        self._folder = folder
        self._files: dict[tuple[object, ...], tuple[Path, Tensor]] = {}
        self.indices: dict[str, dict[str, dict[str, str]]] = {}

    def add(self, task: str, wanted: Mapping[str, Tensor], stored: TaskTensors) -> None:
        """Note what a task's module wants to have on disk."""
        known = {_range(stored[name]): name for name in stored if stored.is_stored(name)}
        index = self.indices[task] = {}
        for name, tensor in wanted.items():
            key = _range(tensor)
            if key in known:
                path, inside = stored.file(known[key]), known[key]
            else:
                home = Path(self._folder or "")
                path, _ = self._files.setdefault(
                    key, (home / f"offloaded-{len(self._files)}.safetensors", tensor)
                )
                inside = _WEIGHT
            index[name] = {"safetensors_file": str(path), "weight_name": inside}

    def fill(self) -> None:
        """Write what no file holds yet.

        Raises:
            ConfigError: there is something to write, and no folder to write it to.
        """
        if self._files and self._folder is None:
            size = sum(tensor.nbytes for _, tensor in self._files.values())
            problem = Problem(
                "offload_folder",
                "none",
                f"a folder for {size} bytes that were cast, stacked or reconstructed when the "
                "checkpoint was read, and that do not fit into max_memory",
                "Name a folder, or raise max_memory.",
            )
            raise ConfigError([problem], _SUBJECT)
        for path, tensor in self._files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({_WEIGHT: tensor.contiguous()}, path)
