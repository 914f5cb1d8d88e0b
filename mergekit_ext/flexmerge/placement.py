"""Where the modules of several tasks go, so that what the checkpoint stores once is there once.

On one device `Sharing` sees to it; over several devices `place` does, with accelerate. accelerate
plans for one module: that is one without data, each part of which has the size that it has in all
tasks together. So what tasks share comes to lie in one place.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mergekit_ext.errors import ConfigError, Problem, listing, require
from mergekit_ext.flexmerge.reader import TaskTensors

AUTO, CPU, DISK = "auto", "cpu", "disk"
Device: TypeAlias = int | str | torch.device
DeviceMap: TypeAlias = str | Mapping[str, Device]
MaxMemory: TypeAlias = Mapping[int | str, int | str]
# The tensors of all tasks by their names in the modules.
_Held: TypeAlias = Mapping[str, Sequence[Tensor]]
# A tensor's memory, not used again while the reference is held, and its view of it.
_Range: TypeAlias = tuple[StorageWeakRef, int, torch.dtype, torch.Size, tuple[int, ...]]
# What a memory range on the CPU has become on a device.
_Moved: TypeAlias = dict[tuple[_Range, Device], Tensor]

_WEIGHT = "weight"
SUBJECT = "placing these models"


class Sharing:
    """What the modules loaded so far are made of, so that the next one can use it too."""

    def __init__(self, device: torch.device):
        self._device = device
        self._moved: _Moved = {}
        self._computed: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, module: Any, stored: Sequence[Tensor]) -> None:
        """Move a module from the CPU to the device; its parameters stay the same objects.

        Tensors of `stored`, which are the checkpoint's and the same objects for all tasks that
        share them, are moved once. Any other (cast, or converted by transformers) is an earlier
        module's of the same name if the values are equal.
        """
        storages = {tensor.untyped_storage().data_ptr() for tensor in stored}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.untyped_storage().data_ptr() in storages:
                tensor.data = _on(self._device, tensor.data, self._moved)
                continue
            own, earlier = tensor.data.to(self._device), self._computed[name]
            same = (o for o in earlier if o.dtype == own.dtype and torch.equal(o, own))
            if (known := next(same, None)) is None:
                earlier.append(known := own)
            tensor.data = known


def _range(tensor: Tensor) -> _Range:
    memory = StorageWeakRef(tensor.untyped_storage())
    return memory, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _on(device: Device, tensor: Tensor, moved: _Moved) -> Tensor:
    """Return a tensor on a device, where each memory range is moved once."""
    if tensor.device == device:
        return tensor
    key = _range(tensor), device
    if key not in moved:
        moved[key] = tensor.to(device)
    return moved[key]


def place(
    modules: Mapping[str, Any],
    tensors: Mapping[str, TaskTensors],
    device_map: DeviceMap,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
) -> None:
    """Spread modules on the CPU over devices; what tasks share goes to one place, once.

    See `mergekit_ext.flexmerge.load`. Raises `ConfigError` if the modules cannot be placed so.
    """
    from accelerate import dispatch_model

    held: dict[str, list[Tensor]] = defaultdict(list)
    for module in modules.values():
        for name, tensor in tensors_of(module).items():
            held[name].append(tensor)
    auto = device_map == AUTO
    plan = _inferred(modules, held, max_memory) if auto else _given(device_map, held)
    main = next((device for device in plan.values() if device not in (CPU, DISK)), CPU)
    moved: _Moved = {}
    written: dict[_Range, Path] = {}
    for task, module in modules.items():
        parts = {n: next(filter(plan.__contains__, _parts(n))) for n in tensors_of(module)}
        own = {part: plan[part] for part in parts.values()}
        on_disk = {
            # accelerate leaves buffers where the work is done.
            name: tensor.data
            for name, tensor in module.named_parameters(remove_duplicate=False)
            if own[parts[name]] == DISK and tensor.numel()
        }
        index = _offloaded(on_disk, tensors[task], offload_folder, written)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if own[parts[name]] not in (CPU, DISK):
                tensor.data = _on(own[parts[name]], tensor.data, moved)
        if len({*own.values()}) == 1 and DISK not in own.values():
            module.hf_device_map = own  # where accelerate keeps it
            continue
        # Not the state dictionary, whose weights are formed of bases and factors.
        on_cpu = {
            name: tensor.data
            for name, tensor in tensors_of(module).items()
            if own[parts[name]] == CPU or not tensor.numel()
        }
        dispatch_model(
            module,
            own,
            main_device=main,
            state_dict=on_cpu or None,
            offload_index=index or None,
            skip_keys=getattr(module, "_skip_keys_device_placement", None),
        )


def tensors_of(module: Any, recurse: bool = True) -> dict[str, Tensor]:
    """Return all parameters and buffers of a module, tied ones under each of their names."""
    parameters = module.named_parameters(recurse=recurse, remove_duplicate=False)
    return dict((*parameters, *module.named_buffers(recurse=recurse, remove_duplicate=False)))


def _parts(name: str) -> Iterator[str]:
    """Yield a tensor's name, and the parts that it is in, from the smallest to all, ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _inferred(
    modules: Mapping[str, Any], held: _Held, max_memory: MaxMemory | None
) -> Mapping[str, Device]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    union = _union(modules, held)
    whole = sorted({name for module in modules.values() for name in module._no_split_modules or ()})
    try:
        given = None if max_memory is None else dict(max_memory)
        memory = get_balanced_memory(union, given, no_split_module_classes=whole)
        return infer_auto_device_map(union, memory, no_split_module_classes=whole)
    except ValueError as error:
        expected = "bytes, or sizes such as '20GB', of 0, 1, ... (GPUs) and 'cpu'"
        problem = Problem("max_memory", f"{max_memory} ({error})", expected)
        raise ConfigError([problem], SUBJECT) from None


def _union(modules: Mapping[str, Any], held: _Held) -> torch.nn.Module:
    """Return a module on the meta device with the parts of all tasks' modules.

    Each of its tensors has as many bytes as those of its name in all tasks; what several share
    counts once. Tensors that are tied in every task are tied.
    """
    parts: dict[str, torch.nn.Module] = {}
    for module in modules.values():
        for path, part in module.named_modules(remove_duplicate=False):
            if path not in parts:
                # accelerate knows what must not be split by the names of classes.
                parts[path] = type(type(part).__name__, (torch.nn.Module,), {})()
                if path:
                    parent, _, leaf = path.rpartition(".")
                    parts[parent].add_module(leaf, parts[path])
    made: dict[tuple[int, ...], torch.nn.Parameter] = {}
    for name, tensors in held.items():
        key = tuple(map(id, tensors))
        if key not in made:
            size = sum({_range(tensor): tensor.nbytes for tensor in tensors}.values())
            data = torch.empty(size, dtype=torch.uint8, device="meta")
            made[key] = torch.nn.Parameter(data, requires_grad=False)
        path, _, leaf = name.rpartition(".")
        parts[path].register_parameter(leaf, made[key])
    return parts[""]


def _given(device_map: DeviceMap, held: _Held) -> Mapping[str, Device]:
    if not isinstance(device_map, Mapping):
        expected = f"{AUTO!r}, or a mapping from parts of the models to devices"
        raise ConfigError([Problem("device_map", repr(device_map), expected)], SUBJECT)
    known = {part for name in held for part in _parts(name)}
    top = ", ".join(sorted({name.partition(".")[0] for name in held}))
    problems = []
    for part, device in device_map.items():
        where = f"device_map[{part!r}]"
        if part not in known:
            expected = f"a part of the models, such as {top}, or '' for all"
            problems.append(Problem(where, "no such part", expected))
        if not _is_here(device):
            expected = f"{CPU}, {DISK} or a device that is here"
            problems.append(Problem(where, repr(device), expected))
    if left := sorted(name for name in held if device_map.keys().isdisjoint(_parts(name))):
        found = f"no place for {listing(left)}"
        problems.append(Problem("device_map", found, "one for every tensor", "Add '': 'cpu'."))
    require(problems, SUBJECT)
    return device_map


def _is_here(device: Device) -> bool:
    try:
        torch.empty(0, device=CPU if device == DISK else device)
    # torch has several errors for devices that are not there.
    except (RuntimeError, AssertionError, TypeError, ValueError):
        return False
    return True


def _offloaded(
    wanted: Mapping[str, Tensor],
    stored: TaskTensors,
    folder: str | os.PathLike[str] | None,
    written: dict[_Range, Path],
) -> dict[str, dict[str, str]]:
    """Return where a task's tensors on disk are read from, as accelerate takes it.

    That is the checkpoint's own file if it holds a tensor as it is, or else a new one in `folder`,
    which is in `written` then.
    """
    index = {}
    own = {_range(tensor): (name, file.path) for tensor, file, name in stored.stored()}
    for name, tensor in wanted.items():
        key = _range(tensor)
        if key not in own and key not in written:
            if folder is None:
                expected = "a folder for what was cast, stacked or reconstructed and does not fit"
                remedy = "Name a folder, or raise max_memory."
                raise ConfigError([Problem("offload_folder", "none", expected, remedy)], SUBJECT)
            path = Path(folder) / f"offloaded-{len(written)}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({_WEIGHT: tensor.contiguous()}, path)
            written[key] = path
        inside, path = own.get(key) or (_WEIGHT, written[key])
        index[name] = {"safetensors_file": str(path), "weight_name": inside}
    return index
