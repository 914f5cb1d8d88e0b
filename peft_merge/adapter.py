r"""LoRA and (IA)^3 adapters as data: the change of each adapted weight.

Modules are known from headers alone (`ModuleInfo`, `VectorInfo`); tensors are read one module at a
time. A layer that PEFT adapts computes :math:`y = f(x) + s\,B(A(x))` (Hu et al. 2021, "LoRA",
section 4.1). Its two tensors become a (n, r, columns) and b (n, rows, r) with one change
:math:`\Delta_k = s\,B_k A_k` for each of n independent matrices:

=========== =================== ================== ============================================
layout      A as stored         B as stored        n
=========== =================== ================== ============================================
linear      (r, in)             (out, r)           1
embedding   (r, vocabulary)     (dimension, r)     1; the weight itself is the change transposed
convolution (r, in, \*kernel)   (out, r/g, 1, ...) g groups of the convolution, each of rank r/g
parameter   (r E, in)           (out, r E)         E experts of a target parameter
=========== =================== ================== ============================================

PEFT convolves with A over all input channels and only B is grouped: group k sees rows k r/g to
(k+1) r/g of A. Of a target parameter A is stacked expert by expert, while B's columns run over the
experts first (PEFT's ``ParamWrapper.get_delta_weight``). Whether the parameter itself is (E, out,
in) or (E, in, out) the adapter does not say; in these coordinates it does not matter.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_ext.errors import MergeError
from mergekit_ext.kernels.numerics import finite

LayoutName = Literal["linear", "embedding", "convolution", "parameter"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModuleInfo:
    """What is known of one adapted weight of a LoRA without reading its factors."""

    layout: LayoutName
    matrices: int  # n: experts of a target parameter, groups of a convolution, otherwise 1
    rows: int  # of each matrix: output features
    columns: int  # of each matrix: input features, times the size of a convolution's kernel
    rank: int  # r of each matrix
    kernel: Shape = ()  # of a convolution
    bias: bool = False  # of B (`lora_bias`)
    dtype: torch.dtype = torch.float32  # of the factors

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the change: (n, rows, columns). Modules that are merged agree in it."""
        return (self.matrices, self.rows, self.columns)

    @property
    def numbers(self) -> int:
        """Of factors, for each rank."""
        return self.matrices * (self.rows + self.columns)

    @property
    def largest_rank(self) -> int:
        return min(self.rows, self.columns)

    @property
    def groups(self) -> int:
        """The matrices among which the r of PEFT's configuration is divided."""
        return self.matrices if self.layout == "convolution" else 1

    @property
    def configured_rank(self) -> int:
        return self.rank * self.groups

    def stack(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return stored factors as stacks (n, r, columns) and (n, rows, r)."""
        stacked = a.reshape(self.matrices, -1, self.columns)
        if self.layout == "parameter":
            return stacked, b.reshape(self.rows, -1, self.matrices).permute(2, 0, 1)
        return stacked, b.reshape(self.matrices, self.rows, -1)

    def store(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return stacked factors as PEFT stores them, contiguous."""
        n, rank, columns = a.shape
        if self.layout == "convolution":
            stored_a = a.reshape(n * rank, columns // math.prod(self.kernel), *self.kernel)
            stored_b = b.reshape(n * self.rows, rank, *(1,) * len(self.kernel))
        else:
            stored_a = a.reshape(n * rank, columns)
            stored_b = b.permute(1, 2, 0).reshape(self.rows, rank * n)
        return stored_a.contiguous(), stored_b.contiguous()


def described(
    layout: LayoutName, a: Shape, b: Shape, r: int, bias: bool, dtype: torch.dtype
) -> ModuleInfo | None:
    """Return the module of factors stored in these shapes; None if they are not of rank `r`."""
    if 0 in (*a, *b):
        return None
    if layout == "convolution":
        fits = len(a) == len(b) > 2 and set(b[2:]) == {1} and a[0] == r
        if not fits or r % b[1] or b[0] % (r // b[1]):
            return None
        groups, columns = r // b[1], math.prod(a[1:])
        return ModuleInfo(layout, groups, b[0] // groups, columns, b[1], a[2:], bias, dtype)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % r:
        return None
    if layout != "parameter" and a[0] != r:
        return None
    return ModuleInfo(layout, a[0] // r, b[0], a[1], r, bias=bias, dtype=dtype)


def one_rank(infos: Iterable[ModuleInfo]) -> int:
    """Return the least r that a configuration without patterns can have for all these factors."""
    each = list(infos)
    step = math.lcm(*(info.groups for info in each))
    return -(-max((info.configured_rank for info in each), default=1) // step) * step


@dataclass(frozen=True)
class Update:
    r"""The change of one weight: :math:`\Delta_k = s\, B_k A_k` for each of its n matrices."""

    a: Tensor  # (n, r, columns), any floating dtype
    b: Tensor  # (n, rows, r)
    scale: float  # s, PEFT's scaling: alpha / r, or alpha / sqrt(r) with rsLoRA
    bias: Tensor | None = None  # (n rows,), of B (`lora_bias`); that of the output gets s * bias

    def dense(self) -> Tensor:
        """Return ``s B A`` in float64: (n, rows, columns)."""
        return self.scale * (self.b.to(torch.float64) @ self.a.to(torch.float64))

    def filled(self, rank: int) -> "Update":
        """Return the same change with zeros up to a rank, which it does not exceed."""
        if (missing := rank - self.a.shape[1]) == 0:
            return self
        return replace(self, a=pad(self.a, (0, 0, 0, missing)), b=pad(self.b, (0, missing)))

    def unscaled(self) -> "Update":
        """Return the same change with a scale of 1, which is in B then."""
        if self.scale == 1:
            return self
        b = (self.b.double() * self.scale).to(self.b.dtype)
        bias = None if self.bias is None else (self.bias.double() * self.scale).to(self.bias.dtype)
        return Update(self.a, b, 1.0, bias)

    def cast(self, dtype: torch.dtype, name: str) -> "Update":
        """Return the update with `cast` tensors."""
        bias = None if self.bias is None else cast(self.bias, dtype, name)
        return Update(cast(self.a, dtype, name), cast(self.b, dtype, name), self.scale, bias)


@dataclass(frozen=True)
class VectorInfo:
    """What is known of one (IA)^3 vector without reading it."""

    shape: Shape  # (1, in), or (out, 1); convolutions have more axes of length 1
    feedforward: bool  # multiplies the module's input, not its output
    dtype: torch.dtype = torch.float32


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


def finite_update(adapter: LoraAdapter, module: str) -> Update:
    """Return one module of a LoRA, all of it `finite`."""
    update = adapter.load(module)
    for part, tensor in (("lora_A", update.a), ("lora_B", update.b), ("lora_B.bias", update.bias)):
        if tensor is not None:
            finite(tensor, f"{module}.{part}", adapter.name)
    return update


def finite_updates(adapters: Sequence[LoraAdapter], module: str) -> list[Update]:
    """Return the `finite_update` of each adapter, of rank 0 for one without the module."""
    n, rows, columns = next(a.infos[module].shape for a in adapters if module in a.infos)
    absent = Update(torch.empty(n, 0, columns), torch.empty(n, rows, 0), 1.0)
    return [finite_update(a, module) if module in a.infos else absent for a in adapters]


def bias_changes(updates: Iterable[Update], device: str | torch.device) -> list[Tensor] | None:
    """Return the changes of the output's bias, (n rows,) in float64; None if all are zero."""
    wide = [None if u.bias is None else u.scale * u.bias.to(device).double() for u in updates]
    known = next((each for each in wide if each is not None), None)
    if known is None:
        return None
    return [torch.zeros_like(known) if each is None else each for each in wide]


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a finite tensor in `dtype`, on the CPU; raise `MergeError` if it leaves the range."""
    result = tensor.detach().to(dtype)
    if not bool(torch.isfinite(result).all()):
        remedy = "Use smaller weights, or a wider dtype."
        raise MergeError(f"{name}: a value leaves the range of {dtype}. {remedy}")
    return result.cpu()
