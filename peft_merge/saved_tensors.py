"""Merging whole tensors that adapters carry: `modules_to_save`, and trained biases of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError, NonFiniteError
from peft_merge.adapter import Adapter


def merge_saved(
    name: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    dtype: torch.dtype | None,
) -> Tensor:
    r""":math:`\sum_i w_i T_i / \sum_i w_i`, in float64; of one adapter its own tensor, untouched.

    Whole numbers, which are checked to be the same, are those of the first adapter.

    Args:
        name: of the tensor; every adapter has it, in one shape.
        adapters: those that it is the mean of.
        weights: one for each, whose sum is not 0.
        dtype: of the result; None for the tensors' own, promoted where they differ.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity.
        MergeError: the mean leaves the dtype's range.
    """
    tensors = [adapter.saved[name]().cpu() for adapter in adapters]
    for adapter, tensor in zip(adapters, tensors, strict=True):
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise NonFiniteError(name, adapter.name, bad, tensor.numel())
    if not all(tensor.is_floating_point() for tensor in tensors):
        return tensors[0]
    target = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    if len(tensors) == 1:
        return _cast(name, tensors[0], target)
    total = math.fsum(weights)
    mean = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        mean.add_(tensor.to(torch.float64), alpha=weight / total)
    return _cast(name, mean, target)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise MergeError(f"{name}: the merged tensor leaves the range of {dtype}. Use a wider one.")
    return result
