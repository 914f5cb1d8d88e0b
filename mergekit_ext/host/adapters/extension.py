"""The functions of mergekit that open models, with adapters applied while reading.

Models without an adapter go to mergekit's own function, which each of these keeps as ``stock``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_ext.host.adapters.fitted import base_of
from mergekit_ext.host.adapters.loader import adapted, open_adapted, wanted
from mergekit_ext.host.adapters.switch import applies
from mergekit_ext.io import paths


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
        loader = open_adapted(model, base, trust_remote_code=options.trust_remote_code)
        return list(loader.index.tensor_paths)

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
                trust_remote_code=self.trust_remote_code,
                device=getattr(self, "math_device", None),
                dtype=dtype_from_name(self.lora_merge_dtype),
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
            self.loaders[model] = adapted(
                reference.lora, model, stock(self, file), config_beside(file), *self.adapters
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

    if paths.exists(model) or model.count("+") != 1:
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
