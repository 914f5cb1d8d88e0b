"""A base with an adapter, as FlexMerge reads models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError
from mergekit_ext.flexmerge.source import Source
from mergekit_ext.headers import TensorHeader
from mergekit_ext.host.adapters.fitted import Fitted


class AdaptedSource:
    """A `Source` that reads what the adapter does not touch as the base's source does.

    Args:
        name: for messages.
        tensors: of the base and of the adapter.
        base: the base's source.
        adapter: what is applied.
        files: the base's and the adapter's.
        device: where it is applied; tensors come on the CPU.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, TensorHeader],
        base: Source,
        adapter: Fitted,
        files: Collection[Path],
        device: str = "cpu",
    ):
        self.name, self.tensors, self.files = name, tensors, files
        self._base, self._adapter, self._device = base, adapter, device

    def read(self, name: str, out: Tensor) -> None:
        """See `Source`."""
        stored = self.tensors[name].name
        if stored in self._adapter.added or stored in self._adapter.touched:
            tensor = self.tensor(name).contiguous().reshape(-1)
            out.view(torch.uint8).copy_(tensor.view(torch.uint8))
        else:
            self._base.read(name, out)

    def expect(self, name: str) -> None:
        """See `Source`."""
        if self.tensors[name].name not in self._adapter.added:
            self._base.expect(name)

    def tensor(self, name: str) -> Tensor:
        """See `Source`; what is adapted is in memory of its own."""
        stored = self.tensors[name].name
        if stored in self._adapter.added:
            return self._adapter.added[stored]()
        tensor = self._base.tensor(name)
        if stored not in self._adapter.touched:
            return tensor
        return self._adapter.apply(stored, tensor.to(self._device)).cpu()


def adapter_folder(path: Any) -> Path:
    """Where the adapter at mergekit's `ModelPath` is on this machine.

    Raises:
        ConfigError: nowhere, and it cannot be downloaded.
    """
    from peft_merge.io.hub import locate

    folder = locate(path.path, path.revision, allow_pickle=True)
    if not isinstance(folder, Path):
        raise ConfigError([folder])
    return folder
