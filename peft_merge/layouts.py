r"""How PEFT stores the factors of an adapted weight, and the same factors as stacked matrices.

A layer that PEFT adapts computes :math:`y = f(x) + s\,B(A(x))` (Hu et al. 2021, "LoRA", section
4.1). Its two tensors become a (n, r, columns) and b (n, rows, r) with one change
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

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_merge.adapter import LayoutName, ModuleInfo

Shape = tuple[int, ...]


class LayoutError(ValueError):
    """Two tensors that are no pair of factors: what was found and what would fit."""

    def __init__(self, found: str, expected: str):
        super().__init__(f"found {found}; expected {expected}")
        self.found, self.expected = found, expected


@dataclass(frozen=True)
class Layout:
    """One way of storing factors.

    Attributes:
        name: of the layout.
        a: what follows the module's name in the key of A.
        b: likewise of B.
        describe: ``(shape of A, shape of B, r, has bias, dtype)`` to what they say, r being the
            rank that the configuration gives. Raises `LayoutError`.
        stack: stored A and B to stacked ones.
        store: stacked A and B to stored ones, contiguous.
        groups: among how many matrices the r of PEFT's configuration is divided.
    """

    name: LayoutName
    a: str
    b: str
    describe: Callable[[Shape, Shape, int, bool, torch.dtype], ModuleInfo]
    stack: Callable[[ModuleInfo, Tensor, Tensor], tuple[Tensor, Tensor]]
    store: Callable[[ModuleInfo, Tensor, Tensor], tuple[Tensor, Tensor]]
    groups: Callable[[ModuleInfo], int]


BIAS = "lora_B.bias"


def _two_axes(a: Shape, b: Shape) -> None:
    if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        raise LayoutError(
            f"A of shape {list(a)} and B of shape {list(b)}", "two matrices that are not empty"
        )


def _matrices(name: LayoutName) -> Callable[[Shape, Shape, int, bool, torch.dtype], ModuleInfo]:
    def describe(a: Shape, b: Shape, r: int, bias: bool, dtype: torch.dtype) -> ModuleInfo:
        _two_axes(a, b)
        if a[0] != r or b[1] != r:
            raise LayoutError(
                f"A of shape {list(a)} and B of shape {list(b)}",
                f"{r} rows in A and {r} columns in B, the rank of the configuration",
            )
        return ModuleInfo(name, 1, b[0], a[1], r, bias=bias, dtype=dtype)

    return describe


def _describe_convolution(a: Shape, b: Shape, r: int, bias: bool, dtype: torch.dtype) -> ModuleInfo:
    kernel = a[2:]
    fitting = len(a) == len(b) > 2 and not (0 in a or 0 in b) and set(b[2:]) == {1}
    if not fitting or a[0] != r or r % b[1] or b[0] % (r // b[1]):
        raise LayoutError(
            f"A of shape {list(a)} and B of shape {list(b)}",
            f"a kernel with {r} outputs in A, the rank of the configuration, and a pointwise one in"
            f" B with {r} inputs or, of g groups, {r} / g",
        )
    groups = r // b[1]
    return ModuleInfo(
        "convolution", groups, b[0] // groups, math.prod(a[1:]), b[1], kernel, bias, dtype
    )


def _describe_parameter(a: Shape, b: Shape, r: int, bias: bool, dtype: torch.dtype) -> ModuleInfo:
    _two_axes(a, b)
    if a[0] != b[1] or a[0] % r:
        raise LayoutError(
            f"A of shape {list(a)} and B of shape {list(b)}",
            f"as many rows in A as columns in B, a multiple of {r}, the rank of the configuration",
        )
    return ModuleInfo("parameter", a[0] // r, b[0], a[1], r, bias=bias, dtype=dtype)


def _stack_matrices(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a[None], b[None]


def _store_matrices(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a[0].contiguous(), b[0].contiguous()


def _stack_convolution(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (
        a.reshape(info.matrices, -1, info.columns),
        b.reshape(info.matrices, info.rows, -1),
    )


def _store_convolution(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    groups, rank, columns = a.shape
    inputs = columns // math.prod(info.kernel)
    pointwise = (1,) * len(info.kernel)
    return (
        a.reshape(groups * rank, inputs, *info.kernel).contiguous(),
        b.reshape(groups * info.rows, rank, *pointwise).contiguous(),
    )


def _stack_parameter(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (
        a.reshape(info.matrices, -1, info.columns),
        b.reshape(info.rows, -1, info.matrices).permute(2, 0, 1),
    )


def _store_parameter(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (
        a.reshape(-1, info.columns).contiguous(),
        b.permute(1, 2, 0).reshape(info.rows, -1).contiguous(),
    )


def _undivided(info: ModuleInfo) -> int:
    return 1


LAYOUTS: dict[LayoutName, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "linear",
            "lora_A.weight",
            "lora_B.weight",
            _matrices("linear"),
            _stack_matrices,
            _store_matrices,
            _undivided,
        ),
        Layout(
            "embedding",
            "lora_embedding_A",
            "lora_embedding_B",
            _matrices("embedding"),
            _stack_matrices,
            _store_matrices,
            _undivided,
        ),
        Layout(
            "convolution",
            "lora_A.weight",
            "lora_B.weight",
            _describe_convolution,
            _stack_convolution,
            _store_convolution,
            lambda info: info.matrices,
        ),
        Layout(
            "parameter",
            "lora_A.weight",
            "lora_B.weight",
            _describe_parameter,
            _stack_parameter,
            _store_parameter,
            _undivided,
        ),
    )
}


def configured_rank(info: ModuleInfo) -> int:
    """Return the r of PEFT's configuration for such factors."""
    return info.rank * LAYOUTS[info.layout].groups(info)


def one_rank(infos: Iterable[ModuleInfo]) -> int:
    """Return the least r that a configuration without patterns can have for all these factors."""
    each = list(infos)
    step = math.lcm(*(LAYOUTS[info.layout].groups(info) for info in each))
    return -(-max(map(configured_rank, each), default=1) // step) * step


def at_rank(info: ModuleInfo, r: int) -> int:
    """Return the rank of each of a module's matrices under an r of the configuration."""
    return r // LAYOUTS[info.layout].groups(info)
