"""mergekit's tensor loader with an adapter applied to what it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError
from mergekit_ext.host.adapters.fitted import Fitted, fit, read_adapter
from mergekit_ext.io.headers import TensorHeader, read_file

_ADAPTER_FILE = "adapter_model.safetensors"
# What the tensor that is being read will be cast to next, by whom asked for it.
_wanted: ContextVar[torch.dtype | None] = ContextVar("wanted", default=None)


@contextmanager
def wanted(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, adapted tensors are not rounded below `dtype`, which they are cast to afterwards."""
    token = _wanted.set(dtype)
    try:
        yield
    finally:
        _wanted.reset(token)


class AdaptedLoader:
    """Has the interface of mergekit's `LazyTensorLoader`, and the tensors of base + adapter.

    Args:
        base: the base's loader, which other adapters of the same base may share.
        fitted: the adapter on that base.
        device: where adapters are applied; None for where a tensor is read.
        dtype: of all floating tensors that are read (mergekit's ``--lora-merge-dtype``); None for
            the dtype of the file.
    """

    def __init__(
        self,
        base: Any,
        fitted: Fitted,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self._base, self._fitted, self._device, self._dtype = base, fitted, device, dtype
        added = dict.fromkeys(fitted.added, _ADAPTER_FILE)
        self.index = dataclasses.replace(
            base.index, tensor_paths={**base.index.tensor_paths, **added}
        )

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: Sequence[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """The tensor `key`, or else the first of `aliases` that there is, on `device`.

        Raises:
            KeyError: there is none, and `raise_on_missing`.
            NonFiniteError: the adapter holds NaN or infinity for it.
        """
        name = next((n for n in (key, *(aliases or ())) if n in self.index.tensor_paths), None)
        if name is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        if name in self._fitted.added:
            tensor = self._fitted.added[name]().to(device)
        else:
            tensor = self._base.get_tensor(name, device=device)
        if name in self._fitted.touched:
            tensor = self._adapted(name, tensor)
        if self._dtype is not None and tensor.is_floating_point():
            return tensor.to(self._dtype)
        return tensor

    def _adapted(self, name: str, tensor: Tensor) -> Tensor:
        # In the widest dtype that somebody will look at, so that it is rounded once.
        following = self._dtype or _wanted.get() or tensor.dtype
        wide = torch.promote_types(tensor.dtype, following)
        place = tensor.device if self._device is None else self._device
        applied = self._fitted.apply(name, tensor.to(device=place, dtype=wide))
        return applied.to(tensor.device)

    def flush(self) -> None:
        """Close what the base has open."""
        self._base.flush()


def open_adapted(
    reference: Any,
    base: Any,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> AdaptedLoader:
    """The loader of a model with an adapter.

    Args:
        reference: mergekit's `ModelReference`.
        base: the loader of its base.
        trust_remote_code: for the base's configuration.
        device, dtype: see `AdaptedLoader`.

    Raises:
        ConfigError: the adapter cannot be read, or not applied to this base exactly.
    """
    config = reference.config(trust_remote_code=trust_remote_code)
    return adapted(reference.lora, str(reference), base, config, device, dtype)


def adapted(
    path: Any,
    name: str,
    base: Any,
    config: Any,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> AdaptedLoader:
    """As `open_adapted`, of an adapter by its `ModelPath` and with the base's configuration."""
    try:
        fitted = fit(read_adapter(path), stored_tensors(base.index), config)
    except ConfigError as error:
        raise ConfigError(error.problems, name) from None
    return AdaptedLoader(base, fitted, device, dtype)


def stored_tensors(index: Any) -> dict[str, TensorHeader]:
    """The headers of everything in mergekit's `ShardedTensorIndex`."""
    found: dict[str, TensorHeader] = {}
    for shard in index.shards:
        headers = read_file(Path(index.base_path) / shard.filename, allow_pickle=True)
        found.update((name, headers[name]) for name in shard.contained_keys if name in headers)
    return found
