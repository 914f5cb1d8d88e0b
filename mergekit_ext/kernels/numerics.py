"""Reductions and conversions that several kernels share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements per pass over a CPU tensor: a float64 chunk of this size stays in the second-level
# cache, so that converting, subtracting and reducing read main memory once.
_CPU_CHUNK = 1 << 19
# A GPU wants few, large kernels; this bounds scratch at half a gigabyte of float64.
_ACCELERATOR_CHUNK = 1 << 26


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any input is float64, else float32: no method computes in half precision."""
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def chunks(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover the flattened `tensor` in cache-sized pieces, for its device."""
    step = _CPU_CHUNK if tensor.device.type == "cpu" else _ACCELERATOR_CHUNK
    for start in range(0, tensor.numel(), step):
        yield slice(start, start + step)


def squared_norm(tensor: Tensor, base: Tensor | None = None) -> float:
    """Return ``||tensor - base||_F**2`` (``||tensor||_F**2`` without `base`).

    Args:
        tensor: any shape, any floating dtype.
        base: the same shape and device.

    The difference is formed in float32 (float64 if an input is float64); products and sums are
    float64, so that neither 1e19 nor 1e-30 leaves the range. NaN or infinity in an input gives a
    non-finite result.
    """
    return squared_norms([tensor], base)[0]


def squared_norms(tensors: Sequence[Tensor], base: Tensor | None = None) -> list[float]:
    """`squared_norm` of several tensors of one shape, which reads `base` once."""
    if not tensors:
        return []
    dtype = compute_dtype(tensors if base is None else [*tensors, base])
    flat = [tensor.reshape(-1) for tensor in tensors]
    flat_base = None if base is None else base.reshape(-1)
    totals = torch.zeros(len(flat), dtype=torch.float64, device=flat[0].device)
    for part in chunks(flat[0]):
        start = None if flat_base is None else flat_base[part].to(dtype)
        for index, source in enumerate(flat):
            x = source[part]
            if start is not None:
                x = x.to(dtype) - start
            x = x.to(torch.float64)
            totals[index] += torch.dot(x, x)
    return totals.tolist()


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: one sum, which float64 holds for narrower inputs."""
    if tensor.dtype == torch.float64:
        return bool(torch.isfinite(tensor).all())
    return math.isfinite(float(tensor.sum(dtype=torch.float64)))


def count_non_finite(tensor: Tensor) -> int:
    """How many entries of `tensor` are NaN or infinite."""
    return int(tensor.numel() - torch.isfinite(tensor).sum())
