"""Make the modules of several tasks use one storage for what the checkpoint stores once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# A memory range of one dtype, shape and stride.
_Range = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


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
        # The tensor on the CPU is kept with the moved one: its address must not be given away.
        self._moved: dict[_Range, tuple[Tensor, Tensor]] = {}
        self._computed: dict[str, list[tuple[Tensor, _Sources]]] = defaultdict(list)

    def add(self, module: Any, stored: Mapping[str, Tensor]) -> None:
        """Move a module to the device, sharing with the earlier ones what can be shared.

        Args:
            module: a ``torch.nn.Module`` on the CPU; its tensors are replaced, its parameters stay
                the same objects.
            stored: the checkpoint's tensors of the task that are stored as they are. A tensor that
                two tasks share is the same object for both.
        """
        storages = {_storage(tensor): name for name, tensor in stored.items()}
        held = [*module.named_parameters(), *module.named_buffers()]
        used = {_storage(tensor) for _, tensor in held}
        sources = _Sources(
            {name: stored[name] for storage, name in storages.items() if storage not in used}
        )
        for name, tensor in held:
            if tensor.numel() == 0:
                tensor.data = tensor.data.to(self._device)
            elif _storage(tensor) in storages:
                tensor.data = self._of_checkpoint(tensor.data)
            else:
                tensor.data = self._of_computation(name, tensor.data.to(self._device), sources)

    def _of_checkpoint(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device:
            return tensor
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._moved:
            self._moved[key] = (tensor, tensor.to(self._device))
        return self._moved[key][1]

    def _of_computation(self, name: str, tensor: Tensor, sources: _Sources) -> Tensor:
        earlier = self._computed[name]
        for other, other_sources in earlier:
            if (
                other.dtype == tensor.dtype
                and other_sources.meet(sources, name)
                and torch.equal(other, tensor)
            ):
                return other
        earlier.append((tensor, sources))
        return tensor


class _Sources:
    """Tensors of a checkpoint that a module does not hold, but was computed from.

    Which of them a parameter came from is transformers' knowledge. Here it is narrowed down by the
    indices in the names (layers, experts): they may be more or fewer, but not different.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._exactly: dict[tuple[str, ...], list[str]] = defaultdict(list)
        self._within: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in tensors:
            indices = _indices(name)
            self._exactly[indices].append(name)
            for length in range(len(indices)):
                self._within[indices[:length]].append(name)

    def meet(self, other: _Sources, parameter: str) -> bool:
        """Return whether both have the same tensor of those that `parameter` may come from."""
        return any(
            other._tensors.get(name) is self._tensors[name] for name in self._candidates(parameter)
        )

    def _candidates(self, parameter: str) -> Iterable[str]:
        indices = _indices(parameter)
        for length in range(len(indices), -1, -1):
            yield from self._exactly.get(indices[:length], ())
        yield from self._within.get(indices, ())


def _indices(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdecimal())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
