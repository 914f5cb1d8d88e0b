"""mergekit's tensor loader with weights dequantised and an adapter applied, as they are read.

``stock`` is mergekit's own function, which opens models without an adapter.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.common import dtype_from_name
from torch import Tensor

from mergekit_ext.errors import ConfigError
from mergekit_ext.host.adapters.fitted import applies, base_of, fit, read_adapter
from mergekit_ext.host.inputs import donor_of
from mergekit_ext.io.headers import TensorHeader, read_folder
from mergekit_ext.io.quantised import QuantisedHeader, dequantised, detach
from peft_merge.weights import AdaptedWeights

# The dtype that the tensor that is being read will be cast to next.
_wanted: ContextVar[torch.dtype | None] = ContextVar("wanted", default=None)


@dataclass
class ModelLoader:
    """Has the interface of mergekit's `LazyTensorLoader`, and the weights of a model.

    Those of `headers` are dequantised, and get the adapter (`weights`) on `device`, or where a
    tensor is read; floating tensors come in `dtype` (``--lora-merge-dtype``) if it is given.
    """

    base: Any
    headers: Mapping[str, TensorHeader]
    weights: AdaptedWeights | None
    device: str | None
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        stored, weights = self.base.index.tensor_paths, self.weights
        paths = {name: stored[header.stored[0].name] for name, header in self.headers.items()}
        added = dict.fromkeys(weights.added if weights else (), "adapter_model.safetensors")
        self.index = replace(self.base.index, tensor_paths={**paths, **added})

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: Sequence[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Return the tensor `key`, or else the first of `aliases` that there is, on `device`."""
        name = next((n for n in (key, *(aliases or ())) if n in self.index.tensor_paths), None)
        if name is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        read = partial(self._plain, device=device)
        if self.weights is None:
            return read(name)
        dtype = self.dtype or _wanted.get()
        return self.weights.read(name, read, self.device, dtype).to(device)

    def _plain(self, name: str, device: str) -> Tensor:
        header, stored = self.headers[name], partial(self.base.get_tensor, device=device)
        if isinstance(header, QuantisedHeader):
            return header.read(stored, _wanted.get())
        return stored(name)

    def flush(self) -> None:
        """Close what the base has open."""
        self.base.flush()


def open_model(
    model: Any, base: Any, config: Any, device: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Return the loader of a `ModelReference`, from that of its base: itself if nothing changes.

    Raises `ConfigError` if the model cannot be dequantised, or the adapter not applied exactly.
    """
    quantisation = detach(config)
    if quantisation is None and not applies(model):
        return base
    base = getattr(base, "base", base)  # which may be an input by itself
    folder = Path(base.index.base_path)
    try:
        headers = dequantised(read_folder(folder, allow_pickle=True), quantisation, folder)
        adapted = applies(model)
        weights = fit(read_adapter(model.lora), headers, config) if adapted else None
    except ConfigError as error:
        raise ConfigError(error.problems, str(model)) from None
    return ModelLoader(base, headers, weights, device, dtype)


def tensor_names(stock: Callable[..., Any], model: Any, options: Any) -> list[str]:
    """Extend ``get_model_tensor_names``: mergekit infers an architecture without a table from it.

    ``ModelReference.lazy_loader``, which it calls, goes on to refuse models with an adapter:
    mergekit-moe, which calls it too, takes hidden states from the base alone.
    """
    if model.lora is not None and not applies(model):
        return stock(model, options)
    base = base_of(model).lazy_loader(
        cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle
    )
    config = model.config(trust_remote_code=options.trust_remote_code)
    return list(open_model(model, base, config).index.tensor_paths)


def setup(stock: Callable[..., Any], self: Any, options: Any) -> None:
    """Extend ``LoaderCache.setup``: remember where to compute."""
    stock(self, options)
    # With several GPUs a thread's own one is not known here.
    self.math_device = None if options.multi_gpu else options.device


def get(stock: Callable[..., Any], self: Any, model: Any) -> Any:
    """Extend ``LoaderCache.get``: one loader of the base for all models that are adapters on it."""
    if model not in self.loaders:
        self.loaders[model] = open_model(
            model,
            stock(self, base_of(model) if applies(model) else model),
            model.config(trust_remote_code=self.trust_remote_code),
            getattr(self, "math_device", None),
            dtype_from_name(self.lora_merge_dtype),
        )
    return self.loaders[model]


def load_tensor(stock: Callable[..., Any], self: Any) -> Any:
    """Extend ``LoadTensor.execute``, which casts what it reads."""
    # Adapted tensors are not rounded below the dtype that they are cast to.
    token = _wanted.set(dtype_from_name(self.dtype))
    try:
        return stock(self)
    finally:
        _wanted.reset(token)


def donor(stock: Callable[..., Any], merge_config: Any, options: Any) -> Any:
    """Extend ``_get_donor_model``: tokenizer and the like come from the base's folder."""
    model = donor_of(merge_config)
    if not applies(model):
        return stock(merge_config.model_copy(update={"base_model": model}), options)
    return model, base_of(model).local_path(cache_dir=options.transformers_cache)
