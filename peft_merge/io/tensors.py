"""Stored tensors of an adapter: headers first, values when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mergekit_ext.dtypes import dtype_name
from mergekit_ext.errors import NonFiniteError, Problem
from mergekit_ext.io import pickles
from mergekit_ext.io.headers import (
    HeaderError,
    TensorHeader,
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


class Tensors(Protocol):
    """Named tensors of which names, shapes and dtypes are known without reading them."""

    headers: Mapping[str, TensorHeader]

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        ...


class SafetensorsFile:
    """A safetensors file; its header is verified, and it is opened at the first `get`."""

    def __init__(self, path: Path):
        self._path = path
        self.headers: Mapping[str, TensorHeader] = read_safetensors(path)
        self._file: Any = None
        self._lock = threading.Lock()

    def get(self, name: str) -> Tensor:
        with self._lock:
            if self._file is None:
                from safetensors import safe_open

                self._file = safe_open(self._path, framework="pt")
            return self._file.get_tensor(name)


class PickleFile:
    """A PyTorch file, read by torch's restricted unpickler."""

    def __init__(self, path: Path):
        self._path = path
        self.headers: Mapping[str, TensorHeader] = read_pickle(path)
        self._state: dict[str, Tensor] | None = None

    def get(self, name: str) -> Tensor:
        if self._state is None:
            self._state = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        return self._state[name]


class Memory:
    """Tensors of a live model."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.headers: Mapping[str, TensorHeader] = {
            name: TensorHeader(
                name, dtype_name(value.dtype), tuple(value.shape), value.numel() * value.itemsize
            )
            for name, value in tensors.items()
        }

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def open_folder(folder: Path, allow_pickle: bool) -> Tensors | Problem:
    """The tensors of an adapter's folder, or what is wrong with its file."""
    path = folder / SAFETENSORS
    try:
        if path.is_file():
            return SafetensorsFile(path)
        pickle = folder / PICKLE
        if pickle.is_file():
            if allow_pickle:
                return PickleFile(pickle)
            return Problem(
                str(pickle),
                pickles.FOUND,
                SAFETENSORS,
                "Ask for a safetensors file; or, if you trust its author, give --allow-pickle (in "
                "Python allow_pickle): only tensors are read from it.",
            )
    except HeaderError as error:
        return Problem(error.file, error.found, error.expected, error.remedy)
    return Problem(
        str(folder), f"no {SAFETENSORS}", "an adapter as PEFT's save_pretrained writes it"
    )


def finite(tensor: Tensor, name: str, adapter: str) -> Tensor:
    """The tensor itself.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(name, adapter, count, tensor.numel())
    return tensor
