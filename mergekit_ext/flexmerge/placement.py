"""Where the modules of several tasks go, so that what the checkpoint stores once is there once.

On one device `Sharing` sees to it; over several devices `place` does, with accelerate. accelerate
plans for one module. `Union` is one without data: it has the tree of a task's module, and each part
of it holds the tensors of all tasks there, one that several share once. So a plan for a part is
right for that part of every task, and what tasks share comes to lie in one place.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.reader import TaskTensors

AUTO, CPU, DISK = "auto", "cpu", "disk"
Device: TypeAlias = int | str | torch.device
DeviceMap: TypeAlias = str | Mapping[str, Device]
MaxMemory: TypeAlias = Mapping[int | str, int | str]
_Plan: TypeAlias = Mapping[str, Device]
# The memory, dtype, shape and strides of a tensor.
_Range: TypeAlias = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]

# What a memory range on the CPU has become on a device, and the range itself.
Moved: TypeAlias = dict[object, tuple[Tensor, Tensor]]
# By layer, tensors of a checkpoint that a module does not hold, but was computed from.
_Sources: TypeAlias = dict[str, dict[str, Tensor]]

_WEIGHT = "weight"
_SUBJECT = "placing these models"


class Sharing:
    """What the modules loaded so far are made of, so that the next one can use it too.

    A loaded module either holds the checkpoint's tensors themselves, or tensors that were computed
    from them: cast, or converted, as transformers stacks the experts of a layer. The first kind is
    shared as it is; on another device the tensor that was moved for an earlier module is taken. One
    of the second kind is taken from an earlier module if both modules computed it from a tensor
    that their tasks share, and if the values are equal.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._moved: Moved = {}
        self._computed: dict[str, list[tuple[Tensor, _Sources]]] = defaultdict(list)

    def add(self, module: Any, stored: Mapping[str, Tensor]) -> None:
        """Move a module to the device, sharing with the earlier ones what can be shared.

        Args:
            module: a ``torch.nn.Module`` on the CPU; its tensors are replaced, its parameters stay
                the same objects.
            stored: the checkpoint's tensors of the task that are stored as they are. A tensor that
                two tasks share is the same object for both.
        """
        names = {_storage(tensor): name for name, tensor in stored.items()}
        held = [*module.named_parameters(), *module.named_buffers()]
        used = {_storage(tensor) for _, tensor in held}
        # Which of these a parameter came from is transformers' knowledge, but for the layer.
        sources: _Sources = defaultdict(dict)
        for storage, name in names.items():
            if storage not in used:
                sources[_layer(name)][name] = stored[name]
        for name, tensor in held:
            if tensor.numel() == 0:
                tensor.data = tensor.data.to(self._device)
            elif _storage(tensor) in names:
                tensor.data = _on(self._device, tensor.data, self._moved)
            else:
                tensor.data = self._shared(name, tensor.data.to(self._device), sources)

    def _shared(self, name: str, tensor: Tensor, sources: _Sources) -> Tensor:
        """Return an earlier module's tensor in place of a computed one, if there is one."""
        earlier, layer = self._computed[name], _layer(name)
        for other, theirs in earlier:
            common = any(theirs[layer].get(key) is own for key, own in sources[layer].items())
            if common and other.dtype == tensor.dtype and torch.equal(other, tensor):
                return other
        earlier.append((tensor, sources))
        return tensor


def _layer(name: str) -> str:
    """Return the first number in a tensor's name, or nothing."""
    return next((part for part in name.split(".") if part.isdecimal()), "")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _on(device: Device, tensor: Tensor, moved: Moved) -> Tensor:
    """Return a tensor on a device, where each memory range is moved once."""
    if tensor.device == device:
        return tensor
    key = (*_range(tensor), device)
    if key not in moved:
        # The tensor on the CPU is kept with the moved one: its address must not be given away.
        moved[key] = tensor, tensor.to(device)
    return moved[key][1]


def place(
    modules: Mapping[str, Any],
    tensors: Mapping[str, TaskTensors],
    device_map: DeviceMap,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
) -> None:
    """Spread modules over devices, the CPU and the disk; what tasks share goes to one place, once.

    `modules` are on the CPU and share their tensors; `tensors` are the checkpoint's. See
    `mergekit_ext.flexmerge.load` for the rest.

    Raises:
        ConfigError: the modules cannot be placed so.
    """
    from accelerate import dispatch_model

    union = Union(modules)
    if device_map == AUTO:
        plan = _inferred(union.module, modules, max_memory)
    else:
        plan = _given(device_map, max_memory, union)
    plans = {task: union.devices_of(task, plan) for task in modules}
    main = next((device for device in plan.values() if device not in (CPU, DISK)), CPU)
    on_disk = {
        task: {
            # accelerate leaves buffers where the work is done.
            name: tensor.data
            for name, tensor in module.named_parameters(remove_duplicate=False)
            if _device_of(name, plans[task]) == DISK
        }
        for task, module in modules.items()
    }
    indices = _offloaded(on_disk, tensors, offload_folder)
    moved: Moved = {}
    for task, module in modules.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            device = _device_of(name, plans[task])
            if device not in (CPU, DISK):
                tensor.data = _on(device, tensor.data, moved)
        devices = set(plans[task].values())
        if len(devices) == 1 and DISK not in devices:
            module.hf_device_map = plans[task]  # where accelerate keeps it
            continue
        dispatch_model(
            module,
            plans[task],
            main_device=main,
            offload_index=indices[task] or None,
            skip_keys=getattr(module, "_skip_keys_device_placement", None),
        )


class Union:
    """The tensors of several modules on the CPU as one module on the meta device.

    Attributes:
        module: a ``torch.nn.Module``.
        names: for each task, the name in the union of each of its tensors.
    """

    def __init__(self, modules: Mapping[str, Any]):
        self._parts: dict[str, Any] = {}
        self._seen: dict[tuple[str, _Range], str] = {}
        self.names: dict[str, dict[str, str]] = {}
        for task, module in modules.items():
            self.names[task] = self._add(module)
        self.module = self._parts[""]

    def devices_of(self, task: str, plan: _Plan) -> dict[str, Device]:
        """Return the part of a plan for the union that one task's module needs."""
        wanted = {}
        for tensor, united in self.names[task].items():
            part = next(part for part in _prefixes(united) if part in plan)
            # Where a tensor was planned by itself, the name may be another one.
            wanted[tensor if part == united else part] = plan[part]
        return wanted

    def _add(self, module: Any) -> dict[str, str]:
        tied: dict[int, Any] = {}
        names = {}
        for path, part in module.named_modules(remove_duplicate=False):
            if path not in self._parts:
                # accelerate knows what must not be split by the names of classes.
                self._parts[path] = type(type(part).__name__, (torch.nn.Module,), {})()
                if path:
                    parent, _, leaf = path.rpartition(".")
                    self._parts[parent].add_module(leaf, self._parts[path])
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        where = f"{path}.{name}" if path else name
                        names[where] = self._tensor(path, name, where, tensor, tied)
        return names

    def _tensor(
        self, path: str, name: str, where: str, tensor: Tensor, tied: dict[int, Any]
    ) -> str:
        """Put a tensor into the union, unless it is there; return its name in the union."""
        key = (where, _range(tensor))
        if key not in self._seen:
            part = self._parts[path]
            while name in part._parameters or name in part._buffers:
                name += "_"
            empty = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, torch.nn.Parameter):
                # Tied in the module: tied in the union.
                made = tied.setdefault(id(tensor), torch.nn.Parameter(empty, requires_grad=False))
                part.register_parameter(name, made)
            else:
                part.register_buffer(name, empty)
            self._seen[key] = f"{path}.{name}" if path else name
        return self._seen[key]


def _prefixes(name: str) -> Iterator[str]:
    """Yield a tensor's name, and the parts that it is in, from the smallest to all, ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _inferred(union: Any, modules: Mapping[str, Any], max_memory: MaxMemory | None) -> _Plan:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = sorted({name for module in modules.values() for name in module._no_split_modules or ()})
    try:
        given = None if max_memory is None else dict(max_memory)
        memory = get_balanced_memory(union, given, no_split_module_classes=whole)
        return infer_auto_device_map(union, memory, no_split_module_classes=whole)
    except ValueError as error:
        expected = "bytes, or sizes such as '20GB', of 0, 1, ... (GPUs) and 'cpu'"
        problem = Problem("max_memory", f"{max_memory} ({error})", expected)
        raise ConfigError([problem], _SUBJECT) from None


def _given(device_map: DeviceMap, max_memory: MaxMemory | None, union: Union) -> _Plan:
    if not isinstance(device_map, Mapping):
        expected = f"{AUTO!r}, or a mapping from parts of the models to devices"
        raise ConfigError([Problem("device_map", repr(device_map), expected)], _SUBJECT)
    problems = []
    if max_memory is not None:
        remedy = "Leave it out: a mapping says where everything goes."
        problems.append(Problem("max_memory", "it", f"it with device_map={AUTO!r} only", remedy))
    tensors = {name for names in union.names.values() for name in names}
    known = {part for name in tensors for part in _prefixes(name)}
    for part, device in device_map.items():
        where = f"device_map[{part!r}]"
        if part not in known:
            parts = ", ".join(sorted(name for name in known if name and "." not in name))
            expected = f"a part of the models, such as {parts}, or '' for all"
            problems.append(Problem(where, "no such part", expected))
        if not _is_here(device):
            problems.append(Problem(where, repr(device), f"{CPU}, {DISK} or a device that is here"))
    left = sorted(n for n in tensors if not any(part in device_map for part in _prefixes(n)))
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


def _device_of(name: str, plan: _Plan) -> Device:
    return next(plan[part] for part in _prefixes(name) if part in plan)


def _range(tensor: Tensor) -> _Range:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _offloaded(
    wanted: Mapping[str, Mapping[str, Tensor]],
    stored: Mapping[str, TaskTensors],
    folder: str | os.PathLike[str] | None,
) -> dict[str, dict[str, dict[str, str]]]:
    """Return for each task where what it wants on disk is read from, as accelerate takes it.

    That is the checkpoint's own files if these hold a tensor as it is, or else new files.

    Raises:
        ConfigError: there is something to write, and no folder to write it to.
    """
    made: dict[_Range, tuple[Path, Tensor]] = {}
    indices: dict[str, dict[str, dict[str, str]]] = {}
    for task, tensors in wanted.items():
        files, index = stored[task].files, indices.setdefault(task, {})
        known = {_range(stored[task][name]): name for name in files}
        for name, tensor in tensors.items():
            key = _range(tensor)
            inside = known.get(key, _WEIGHT)
            if key in known:
                path = files[inside].path
            else:
                new = Path(folder or "") / f"offloaded-{len(made)}.safetensors"
                path, _ = made.setdefault(key, (new, tensor))
            index[name] = {"safetensors_file": str(path), "weight_name": inside}
    if made and folder is None:
        size = sum(tensor.nbytes for _, tensor in made.values())
        problem = Problem(
            "offload_folder",
            "none",
            f"a folder for {size} bytes that were cast, stacked or reconstructed when the "
            "checkpoint was read, and that do not fit into max_memory",
            "Name a folder, or raise max_memory.",
        )
        raise ConfigError([problem], _SUBJECT)
    for path, tensor in made.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({_WEIGHT: tensor.contiguous()}, path)
    return indices
