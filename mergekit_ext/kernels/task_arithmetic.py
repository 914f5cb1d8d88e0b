"""Weighted sums of task vectors and of weights, in one pass over the inputs.

Ilharco et al., "Editing Models with Task Arithmetic", section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import Buffers, chunks, compute_dtype


def add_task_vectors(
    base: Tensor,
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return :math:`W_0 + \sum_i c_i (W_i - W_0)`.

    Args:
        base: :math:`W_0`, any shape and floating dtype.
        tensors: the :math:`W_i`, the shape and device of `base`.
        coefficients: one :math:`c_i` for each tensor.
        out_dtype: dtype of the result; by default that of `base`.

    Differences and sums are float32 (float64 if an input is float64) and are cast once. A model
    that equals the base adds exactly nothing. Scratch: three cache-sized chunks.
    """
    dtype = compute_dtype([base, *tensors])
    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    flat_out, flat_base = out.view(-1), base.reshape(-1)
    flat = [t.reshape(-1) for t in tensors]
    buffers = Buffers(flat_base, dtype, 3)
    for part in chunks(flat_base):
        start, delta, total = buffers.of(part)
        start.copy_(flat_base[part])
        total.zero_()
        for source, coefficient in zip(flat, coefficients, strict=True):
            total.add_(delta.copy_(source[part]).sub_(start), alpha=coefficient)
        flat_out[part] = total.add_(start)
    return out


def weighted_sum(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return :math:`\sum_i c_i W_i`; dtypes, shapes and scratch as `add_task_vectors`."""
    dtype = compute_dtype(tensors)
    first = tensors[0]
    out = torch.empty(first.shape, dtype=out_dtype or first.dtype, device=first.device)
    flat_out = out.view(-1)
    flat = [t.reshape(-1) for t in tensors]
    buffers = Buffers(flat[0], dtype, 2)
    for part in chunks(flat[0]):
        total, weights = buffers.of(part)
        total.zero_()
        for source, coefficient in zip(flat, coefficients, strict=True):
            total.add_(weights.copy_(source[part]), alpha=coefficient)
        flat_out[part] = total
    return out
