"""What the modules of several tasks hold together, as one module without data.

accelerate plans for one module. This one has the tree of a task's module; each part of it holds
the tensors of all tasks there, one that several share once. So what it plans for a part is right
for that part of every task, and what tasks share comes to lie in one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Outline:
    """The outline of several modules on the CPU.

    Attributes:
        module: a ``torch.nn.Module`` on the meta device.
        names: for each task, the name in the outline of each of its tensors.
    """

    def __init__(self, modules: Mapping[str, Any]):
        self.module: Any = None
        self._parts: dict[str, Any] = {}
        self._seen: dict[tuple[str, object], str] = {}
        self.names: dict[str, dict[str, str]] = {}
        for task, module in modules.items():
            self.names[task] = self._add(module)
        self.module = self._parts[""]

    def devices_of(self, task: str, plan: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a plan for the outline that one task's module needs.

        Args:
            task: its name.
            plan: from parts, or single tensors, to devices; each tensor is in one of them.
        """
        wanted = {}
        for tensor, outlined in self.names[task].items():
            part = next(part for part in prefixes(outlined) if part in plan)
            # Where a tensor was planned by itself, the name may be another one.
            wanted[tensor if part == outlined else part] = plan[part]
        return wanted

    def _add(self, module: Any) -> dict[str, str]:
        outlined: dict[int, Any] = {}
        names = {}
        for path, part in module.named_modules(remove_duplicate=False):
            here = self._part(path, type(part).__name__)
            for kind, tensors in (("parameter", part._parameters), ("buffer", part._buffers)):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        full = f"{path}.{name}" if path else name
                        names[full] = self._tensor(here, path, name, tensor, kind, outlined)
        return names

    def _part(self, path: str, kind: str) -> Any:
        if path not in self._parts:
            # accelerate knows what must not be split by the names of classes.
            made = type(kind, (torch.nn.Module,), {})()
            self._parts[path] = made
            if path:
                parent, _, name = path.rpartition(".")
                self._parts[parent].add_module(name, made)
        return self._parts[path]

    def _tensor(
        self,
        part: Any,
        path: str,
        name: str,
        tensor: Tensor,
        kind: str,
        outlined: dict[int, Any],
    ) -> str:
        """Put a tensor into the outline, unless another task has put it there."""
        where = f"{path}.{name}" if path else name
        key = (where, (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
        if key in self._seen:
            return self._seen[key]
        free = name
        while free in part._parameters or free in part._buffers:
            free += "_"
        empty = torch.empty_like(tensor, device="meta")
        if kind == "buffer":
            part.register_buffer(free, empty)
        else:
            # Tied in the module: tied in the outline.
            tied = outlined.setdefault(id(tensor), torch.nn.Parameter(empty, requires_grad=False))
            part.register_parameter(free, tied)
        self._seen[key] = f"{path}.{free}" if path else free
        return self._seen[key]


def prefixes(name: str) -> Iterator[str]:
    """A tensor's name, and the parts that it is in, from the smallest to the whole, ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
