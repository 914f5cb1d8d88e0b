"""Stored tensors of an adapter: headers first, values when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import Problem
from mergekit_ext.io.headers import (
    PICKLE_FOUND,
    HeaderError,
    TensorHeader,
    dtype_name,
    read_pickle,
    read_safetensors,
)

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

# What follows the module's name in the key of an (IA)^3 vector.
VECTOR = "ia3_l"

# What factors and vectors may be stored as, by the names of the safetensors format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Tensors:
    """Named tensors of which names, shapes and dtypes are known without reading them."""

    headers: Mapping[str, TensorHeader]
    get: Callable[[str], Tensor]


def of_memory(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors of a live model, which are not copied."""
    headers = {
        name: TensorHeader(name, dtype_name(t.dtype), tuple(t.shape), t.numel() * t.itemsize)
        for name, t in tensors.items()
    }
    return Tensors(headers, lambda name: tensors[name].detach())


class _Once:
    """A file that is opened at the first tensor, by one thread; mapped, not read."""

    def __init__(self, open_file: Callable[[], Any], get: Callable[[Any, str], Tensor]):
        self._open, self._get = open_file, get
        self._file: Any = None
        self._lock = threading.Lock()

    def get(self, name: str) -> Tensor:
        with self._lock:
            if self._file is None:
                self._file = self._open()
            return self._get(self._file, name)


def _of_safetensors(path: Path) -> Tensors:
    from safetensors import safe_open

    file = _Once(lambda: safe_open(path, framework="pt"), lambda file, name: file.get_tensor(name))
    return Tensors(read_safetensors(path), file.get)


def _of_pickle(path: Path) -> Tensors:
    def state() -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    return Tensors(read_pickle(path), _Once(state, lambda found, name: found[name]).get)


def open_folder(folder: Path, allow_pickle: bool) -> Tensors | Problem:
    """Return the tensors of an adapter's folder, or what is wrong with its file."""
    path, pickle = folder / SAFETENSORS, folder / PICKLE
    try:
        if path.is_file():
            return _of_safetensors(path)
        if pickle.is_file() and allow_pickle:
            return _of_pickle(pickle)
    except HeaderError as error:
        return Problem(error.file, error.found, error.expected, error.remedy)
    if pickle.is_file():
        return Problem(
            str(pickle),
            PICKLE_FOUND,
            SAFETENSORS,
            "Ask for a safetensors file; or, if you trust its author, give --allow-pickle (in "
            "Python allow_pickle): only tensors are read from it.",
        )
    expected = "an adapter as PEFT's save_pretrained writes it"
    return Problem(str(folder), f"no {SAFETENSORS}", expected)
