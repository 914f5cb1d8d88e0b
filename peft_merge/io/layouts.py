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
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from peft_merge.adapter import LayoutName, ModuleInfo, Update
from peft_merge.algebra.truncated import padded

Shape = tuple[int, ...]

# What follows the module's name in the keys of A, of B, and of the bias of B.
FACTORS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
BIAS = "lora_B.bias"


def keys(layout: LayoutName) -> tuple[str, str]:
    """Return what follows a module's name in the keys of A and of B."""
    return EMBEDDING_FACTORS if layout == "embedding" else FACTORS


def describe(
    layout: LayoutName, a: Shape, b: Shape, r: int, bias: bool, dtype: torch.dtype
) -> ModuleInfo | str:
    """Return the module of factors of shapes `a` and `b`, or a text: the shapes that would fit.

    Args:
        r: the rank that the configuration gives.
    """
    empty = 0 in (*a, *b)
    if layout == "convolution":
        fits = len(a) == len(b) > 2 and not empty and set(b[2:]) == {1} and a[0] == r
        if not fits or r % b[1] or b[0] % (r // b[1]):
            return (
                f"a kernel with {r} outputs in A, the rank of the configuration, and a pointwise "
                f"one in B with {r} inputs or, of g groups, {r} / g"
            )
        groups = r // b[1]
        columns = math.prod(a[1:])
        return ModuleInfo(layout, groups, b[0] // groups, columns, b[1], a[2:], bias, dtype)
    if len(a) != 2 or len(b) != 2 or empty:
        return "two matrices that are not empty"
    if layout == "parameter":
        if a[0] != b[1] or a[0] % r:
            return (
                f"as many rows in A as columns in B, a multiple of {r}, the rank of the "
                "configuration"
            )
    elif a[0] != r or b[1] != r:
        return f"{r} rows in A and {r} columns in B, the rank of the configuration"
    return ModuleInfo(layout, a[0] // r, b[0], a[1], r, bias=bias, dtype=dtype)


def stack(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return stored factors as stacks (n, r, columns) and (n, rows, r)."""
    stacked = a.reshape(info.matrices, -1, info.columns)
    if info.layout == "parameter":
        return stacked, b.reshape(info.rows, -1, info.matrices).permute(2, 0, 1)
    return stacked, b.reshape(info.matrices, info.rows, -1)


def store(info: ModuleInfo, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return stacked factors as PEFT stores them, contiguous."""
    n, rank, columns = a.shape
    if info.layout == "convolution":
        stored_a = a.reshape(n * rank, columns // math.prod(info.kernel), *info.kernel)
        stored_b = b.reshape(n * info.rows, rank, *(1,) * len(info.kernel))
    else:
        stored_a = a.reshape(n * rank, columns)
        stored_b = b.permute(1, 2, 0).reshape(info.rows, rank * n)
    return stored_a.contiguous(), stored_b.contiguous()


def _groups(info: ModuleInfo) -> int:
    """Return the number of matrices among which the r of PEFT's configuration is divided."""
    return info.matrices if info.layout == "convolution" else 1


def configured_rank(info: ModuleInfo) -> int:
    """Return the r of PEFT's configuration for such factors."""
    return info.rank * _groups(info)


def one_rank(infos: Iterable[ModuleInfo]) -> int:
    """Return the least r that a configuration without patterns can have for all these factors."""
    each = list(infos)
    step = math.lcm(*map(_groups, each))
    return -(-max(map(configured_rank, each), default=1) // step) * step


def at_rank(info: ModuleInfo, r: int) -> int:
    """Return the rank of each of a module's matrices under an r of the configuration."""
    return r // _groups(info)


def filled(update: Update, rank: int) -> Update:
    """Return the same change with zeros up to a rank; itself if it has it."""
    if update.a.shape[-2] == rank:
        return update
    return replace(update, a=padded(update.a, rank, -2), b=padded(update.b, rank, -1))


def unscaled(update: Update) -> Update:
    """Return the same change with a scale of 1, which is in B then."""
    if update.scale == 1:
        return update

    def scaled(tensor: Tensor) -> Tensor:
        return (tensor.double() * update.scale).to(tensor.dtype)

    bias = None if update.bias is None else scaled(update.bias)
    return Update(update.a, scaled(update.b), 1.0, bias)
