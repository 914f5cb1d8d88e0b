"""LoRA and (IA)^3 adapters as data: the change of each adapted weight.

An adapter is read (`peft_merge.io`) into one of two classes. Their modules are known from headers
alone (`ModuleInfo`, `VectorInfo`); tensors are read one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_ext.errors import NonFiniteError

# How PEFT stores a module's factors; `peft_merge.io.layouts` converts each to stacked matrices.
LayoutName = Literal["linear", "embedding", "convolution", "parameter"]


@dataclass(frozen=True)
class ModuleInfo:
    """What is known of one adapted weight of a LoRA without reading its factors.

    Attributes:
        layout: how PEFT stores the factors.
        matrices: n, the independent matrices that the weight is made of: experts of a target
            parameter, groups of a convolution, 1 otherwise.
        rows: of each matrix (output features).
        columns: of each matrix (input features; times the kernel's size for a convolution).
        rank: r of each matrix.
        kernel: the kernel of a convolution, () otherwise.
        bias: whether B has a bias (`lora_bias`).
        dtype: of the factors.
    """

    layout: LayoutName
    matrices: int
    rows: int
    columns: int
    rank: int
    kernel: tuple[int, ...] = ()
    bias: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the change: (n, rows, columns). Modules that are merged agree in it."""
        return (self.matrices, self.rows, self.columns)


@dataclass(frozen=True)
class Update:
    r"""The change of one weight: :math:`\Delta_k = s\, B_k A_k` for each of its n matrices.

    Attributes:
        a: (n, r, columns), any floating dtype.
        b: (n, rows, r), the same dtype and device.
        scale: s, PEFT's scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        bias: (n rows,), the bias of B (`lora_bias`), or None. The change of the output's bias is
            ``s * bias``.
    """

    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None

    def dense(self) -> Tensor:
        """Return ``s B A`` in float64: (n, rows, columns)."""
        return self.scale * (self.b.to(torch.float64) @ self.a.to(torch.float64))


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA: `config` as in adapter_config.json, and one `Update` for each adapted weight.

    Attributes:
        name: of the adapter in messages and reports, and of its task.
        config: the fields of adapter_config.json.
        infos: by the name of the weight's module, as in PEFT's files without the prefix
            ``base_model.model.`` (for target parameters with PEFT's ``base_layer`` parts).
        load: reads one module's update.
        saved: whole tensors that the adapter carries, by the names of the base's tensors that they
            replace (without PEFT's ``base_layer`` parts): `modules_to_save`, trained biases of the
            base (`bias`), and embeddings that PEFT saved along. Read when called.
    """

    name: str
    config: Mapping[str, Any]
    infos: Mapping[str, ModuleInfo]
    load: Callable[[str], Update] = field(repr=False)
    saved: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class VectorInfo:
    """What is known of one (IA)^3 vector without reading it.

    Attributes:
        shape: as stored: (1, in) for a feedforward module, (out, 1) otherwise; convolutions
            have more axes of length 1.
        feedforward: whether it multiplies the module's input, not its output.
        dtype: of the vector.
    """

    shape: tuple[int, ...]
    feedforward: bool
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Ia3Adapter:
    """An (IA)^3: one multiplicative vector for each adapted module; absent ones are 1.

    Attributes are those of `LoraAdapter`; `load` reads one vector in its stored shape.
    """

    name: str
    config: Mapping[str, Any]
    infos: Mapping[str, VectorInfo]
    load: Callable[[str], Tensor] = field(repr=False)
    saved: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)


Adapter = LoraAdapter | Ia3Adapter


def modules_of(adapters: Iterable[Adapter]) -> list[str]:
    """Return the modules that some adapter has, in the order in which they first occur."""
    return list(dict.fromkeys(module for adapter in adapters for module in adapter.infos))


def finite(tensor: Tensor, name: str, adapter: str) -> Tensor:
    """Return the tensor itself.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(name, adapter, count, tensor.numel())
    return tensor


def finite_update(adapter: LoraAdapter, module: str) -> Update:
    """Read one module of a LoRA.

    Raises:
        NonFiniteError: a factor or the bias holds NaN or infinity.
    """
    update = adapter.load(module)
    for part, tensor in (("lora_A", update.a), ("lora_B", update.b), ("lora_B.bias", update.bias)):
        if tensor is not None:
            finite(tensor, f"{module}.{part}", adapter.name)
    return update
