"""A base with an adapter, as FlexMerge reads models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.source import Source
from mergekit_ext.host.adapters.fitted import Fitted
from mergekit_ext.io.headers import TensorHeader


class AdaptedSource(Source):
    """Reads what the adapter does not touch as the base's source does.

    Args:
        name: for messages.
        tensors: of the base and of the adapter, in the dtypes that they are read in.
        base: the base's source, with the same names.
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
        super().__init__(name, tensors, files)
        self._base, self._adapter, self._device = base, adapter, device

    def read(self, name: str, out: Tensor) -> None:
        """See `Source`."""
        if self._as_stored(name):
            self._base.read(name, out)
        else:
            super().read(name, out)

    def expect(self, name: str) -> None:
        """See `Source`."""
        if self.tensors[name].name not in self._adapter.added:
            self._base.expect(name)

    def tensor(self, name: str) -> Tensor:
        """See `Source`; what is adapted is in memory of its own."""
        header = self.tensors[name]
        if self._as_stored(name):
            return self._base.tensor(name)
        if header.name in self._adapter.added:
            tensor = self._adapter.added[header.name]()
        else:
            tensor = self._base.tensor(name)
        dtype = FLOATING.get(header.dtype, tensor.dtype)
        if header.name in self._adapter.touched:
            wide = torch.promote_types(tensor.dtype, dtype)
            tensor = self._adapter.apply(header.name, tensor.to(self._device, wide)).cpu()
        return tensor.to(dtype)

    def _as_stored(self, name: str) -> bool:
        header = self.tensors[name]
        if header.name in self._adapter.added or header.name in self._adapter.touched:
            return False
        return header.dtype == self._base.tensors[name].dtype


def adapter_folder(path: Any) -> Path:
    """Where the adapter at mergekit's `ModelPath` is on this machine.

    Raises:
        ConfigError: nowhere, and it cannot be downloaded.
    """
    from peft_merge.io.read import locate

    return locate(path.path, path.revision, allow_pickle=True)
