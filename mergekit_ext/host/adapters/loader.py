"""mergekit's tensor loader with an adapter applied to what it reads.

Below it are mergekit's functions that open models, with adapters applied while reading. Models
without an adapter go to mergekit's own function, which each of these keeps as ``stock``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError
from mergekit_ext.host.adapters.fitted import applies, base_of, fit, read_adapter
from mergekit_ext.io.headers import TensorHeader, read_file
from peft_merge.weights import AdaptedWeights

_ADAPTER_FILE = "adapter_model.safetensors"
# What the tensor that is being read will be cast to next.
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
        weights: the adapter on that base.
        device: where adapters are applied; None for where a tensor is read.
        dtype: of all floating tensors that are read (mergekit's ``--lora-merge-dtype``); None for
            the dtype of the file.
    """

    def __init__(
        self, base: Any, weights: AdaptedWeights, device: str | None, dtype: torch.dtype | None
    ):
        self._base, self._weights, self._device, self._dtype = base, weights, device, dtype
        added = dict.fromkeys(weights.added, _ADAPTER_FILE)
        self.index = replace(base.index, tensor_paths={**base.index.tensor_paths, **added})

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: Sequence[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Return the tensor `key`, or else the first of `aliases` that there is, on `device`.

        Raises:
            KeyError: there is none, and `raise_on_missing`.
            NonFiniteError: the adapter holds NaN or infinity for it.
        """
        name = next((n for n in (key, *(aliases or ())) if n in self.index.tensor_paths), None)
        if name is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        base = partial(self._base.get_tensor, device=device)
        dtype = self._dtype or _wanted.get()
        return self._weights.read(name, base, self._device, dtype).to(device)

    def flush(self) -> None:
        """Close what the base has open."""
        self._base.flush()


def open_adapted(
    reference: Any,
    base: Any,
    config: Any,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> AdaptedLoader:
    """Return the loader of a model with an adapter.

    Args:
        reference: mergekit's `ModelReference`.
        base: the loader of its base.
        config: the base's transformers configuration; None for a bare file of weights.
        device, dtype: see `AdaptedLoader`.

    Raises:
        ConfigError: the adapter cannot be read, or not applied to this base exactly.
    """
    try:
        weights = fit(read_adapter(reference.lora), stored_tensors(base.index), config)
    except ConfigError as error:
        raise ConfigError(error.problems, str(reference)) from None
    return AdaptedLoader(base, weights, device, dtype)


def stored_tensors(index: Any) -> dict[str, TensorHeader]:
    """The headers of everything in mergekit's `ShardedTensorIndex`."""
    found: dict[str, TensorHeader] = {}
    for shard in index.shards:
        headers = read_file(Path(index.base_path) / shard.filename, allow_pickle=True)
        found.update((name, headers[name]) for name in shard.contained_keys if name in headers)
    return found


def tensor_names(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``get_model_tensor_names``, from which mergekit infers an architecture without a table.

    ``ModelReference.lazy_loader``, which it calls, goes on to refuse models with an adapter:
    mergekit-moe, which calls it too, takes hidden states from the base alone.
    """

    def get_model_tensor_names(model: Any, options: Any) -> list[str]:
        if not applies(model):
            return stock(model, options)
        base = base_of(model).lazy_loader(
            cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle
        )
        config = model.config(trust_remote_code=options.trust_remote_code)
        return list(open_adapted(model, base, config).index.tensor_paths)

    return get_model_tensor_names


def setup(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``LoaderCache.setup``, which also remembers where to compute."""

    def setup(self: Any, options: Any) -> None:
        stock(self, options)
        # With several GPUs a thread's own one is not known here.
        self.math_device = None if options.multi_gpu else options.device

    return setup


def get(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``LoaderCache.get``: one loader of the base for all models that are adapters on it."""

    def get(self: Any, model: Any) -> Any:
        if not applies(model):
            return stock(self, model)
        if model not in self.loaders:
            from mergekit.common import dtype_from_name

            self.loaders[model] = open_adapted(
                model,
                stock(self, base_of(model)),
                model.config(trust_remote_code=self.trust_remote_code),
                getattr(self, "math_device", None),
                dtype_from_name(self.lora_merge_dtype),
            )
        return self.loaders[model]

    return get


def load_tensor(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``execute`` of ``LoadTensor`` and ``SimpleLoadTensor``, which cast what they have read."""

    def execute(self: Any) -> Any:
        from mergekit.common import dtype_from_name

        with wanted(dtype_from_name(self.dtype)):
            return stock(self)

    return execute


def donor(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``_get_donor_model``: tokenizer and the like come from the base's folder."""

    def donor(merge_config: Any, options: Any) -> Any:
        model = merge_config.base_model or merge_config.referenced_models()[0]
        if not applies(model):
            return stock(merge_config, options)
        folder = base_of(model).local_path(cache_dir=options.transformers_cache)
        return model, folder

    return donor


def file_loader(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``SimpleLoaderCache.get`` of mergekit-pytorch: ``file.safetensors+adapter``."""

    def get(self: Any, model: str) -> Any:
        reference = file_with_adapter(model)
        if reference is None:
            return stock(self, model)
        if model not in self.loaders:
            file = reference.model.path
            self.loaders[model] = open_adapted(
                reference, stock(self, file), config_beside(file), *self.adapters
            )
        return self.loaders[model]

    return get


def set_up_files(options: Any) -> None:
    """What ``LoaderCache.setup`` does, for mergekit-pytorch, which sets up only how to unpickle."""
    from mergekit.common import dtype_from_name
    from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

    cache = SimpleLoaderCache()
    device = None if options.multi_gpu else options.device
    cache.adapters = (device, dtype_from_name(options.lora_merge_dtype))
    for model in [model for model in cache.loaders if file_with_adapter(model) is not None]:
        del cache.loaders[model]  # opened for an earlier merge


def by_model(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``TensorDictWrapper.execute``, which makes models of texts again, other ones if they have a
    plus sign."""

    def execute(self: Any, **tensors: Any) -> dict[Any, Any]:
        return {
            model: tensors[key] for model, key in zip(self.tensors, self.arguments(), strict=True)
        }

    return execute


def file_with_adapter(model: str) -> Any:
    """What ``file+adapter`` refers to; None where `model` is a file's name, or has no adapter."""
    from mergekit.common import ModelReference

    if os.path.exists(model) or model.count("+") != 1:
        return None
    reference = ModelReference.parse(model)
    return reference if applies(reference) else None


def config_beside(file: str) -> Any:
    """The configuration in the folder of a file of weights, which says what is tied; or None."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = Path(file).parent
    if not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError):
        return None  # not a model's: the file is taken by the names in it alone
