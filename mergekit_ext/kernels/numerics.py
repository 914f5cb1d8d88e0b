"""Sums, norms and checks of tensors in cache-sized pieces, which several kernels share."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_ext.errors import NonFiniteError
from mergekit_ext.kernels.threads import in_threads, scratch

# Entries of which a few chunks stay in the caches of a CPU, so that main memory is read once.
_CPU_CHUNK = 1 << 19
# A GPU wants few, large kernels; this bounds scratch at a gigabyte of float64.
_ACCELERATOR_CHUNK = 1 << 26
# Sums of a chunk's float32 squares in this range have lost nothing to underflow or overflow.
_SAFE_SQUARES = (1e-20, 1e37)


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return float64 if any input is, else float32: no method computes in half precision."""
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def chunks(tensor: Tensor) -> Iterator[slice]:
    """Yield slices that cover the flattened `tensor` in pieces for its device."""
    step, size = chunk_length(tensor.device.type), tensor.numel()
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def chunk_length(device: str) -> int:
    """Return how many entries `chunks` gives at once on a kind of device."""
    return _CPU_CHUNK if device == "cpu" else _ACCELERATOR_CHUNK


def squared_norms(tensors: Sequence[Tensor], base: Tensor | None = None) -> list[float]:
    """Return ``||t - base||_F**2`` of each tensor (``||t||_F**2`` without `base`).

    One shape and device, any floating dtypes. Differences and squares are float32 (float64 if an
    input is), summed in chunks, and the chunks in float64 (relative error below 1e-6); a chunk
    whose squares could leave float32's range is done in float64. NaN or infinity in an input gives
    a non-finite result.
    """
    if not tensors:
        return []
    dtype = compute_dtype(tensors if base is None else [*tensors, base])
    flat = [tensor.reshape(-1) for tensor in tensors]
    flat_base = None if base is None else base.reshape(-1)

    def squares(part: slice) -> list[float]:
        delta, buffer = scratch(2, part.stop - part.start, dtype, flat[0].device)
        start = None if flat_base is None else buffer.copy_(flat_base[part])
        return [_square(delta, source[part], start) for source in flat]

    found = in_threads(squares, chunks(flat[0]), flat[0].device)
    return [math.fsum(totals) for totals in zip(*found, strict=True)] or [0.0] * len(flat)


def _square(delta: Tensor, source: Tensor, start: Tensor | None) -> float:
    delta.copy_(source)
    total = float((delta if start is None else delta.sub_(start)).square_().sum())
    if delta.dtype == torch.float64 or _SAFE_SQUARES[0] < total < _SAFE_SQUARES[1]:
        return total
    delta.copy_(source)
    wide = (delta if start is None else delta.sub_(start)).to(torch.float64)
    return float(torch.dot(wide, wide))


def weighted_sum(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    out_dtype: torch.dtype | None = None,
    base: Tensor | None = None,
    squares: list[float] | None = None,
) -> Tensor:
    r"""Return :math:`\sum_i c_i W_i`, or with a base :math:`W_0 + \sum_i c_i (W_i - W_0)`.

    The latter: Ilharco et al., "Editing Models with Task Arithmetic", section 2.

    One shape and device, any floating dtypes. Differences and sums are float32 (float64 if an input
    is) and are cast once, to `out_dtype` or else the dtype of the base, or of the first tensor. A
    model that equals the base adds exactly nothing. `squares` gets the squared norm of each chunk
    of the sum, before the cast and without the base. Scratch: three cache-sized chunks.
    """
    like = tensors[0] if base is None else base
    dtype = compute_dtype([like, *tensors])
    out = torch.empty(like.shape, dtype=out_dtype or like.dtype, device=like.device)
    flat_out, flat = out.view(-1), [t.reshape(-1) for t in tensors]
    flat_base = None if base is None else base.reshape(-1)

    def add(part: slice) -> None:
        start, piece, total = scratch(3, part.stop - part.start, dtype, like.device)
        total.zero_()
        if flat_base is not None:
            start.copy_(flat_base[part])
        for source, coefficient in zip(flat, coefficients, strict=True):
            piece.copy_(source[part])
            total.add_(piece if flat_base is None else piece.sub_(start), alpha=coefficient)
        if squares is not None:  # while the chunk is in the cache
            squares.append(_square(piece, total, None))
        flat_out[part] = total if flat_base is None else total.add_(start)

    in_threads(add, chunks(flat_out), like.device)
    return out


def all_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    flat = tensor.reshape(-1)

    def finite(part: slice) -> bool:
        # A sum is a cheap proof; a finite tensor's may still overflow.
        piece = flat[part]
        return math.isfinite(float(piece.sum())) or bool(torch.isfinite(piece).all())

    return all(in_threads(finite, chunks(flat), flat.device))


def count_non_finite(tensor: Tensor) -> int:
    """Return how many entries are NaN or infinite."""
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def finite(tensor: Tensor, name: str, owner: str) -> Tensor:
    """Return a tensor itself; raise `NonFiniteError` if it holds NaN or infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if not all_finite(torch.view_as_real(wide) if wide.is_complex() else wide):
        raise NonFiniteError(name, owner, count_non_finite(wide), wide.numel())
    return tensor


def require_alike(name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> None:
    """Check that tensors, and a base, have one shape and are finite.

    Raises:
        ValueError: naming ``name[i]`` or ``base``, what was found and what was expected.
    """
    labelled = {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}
    for label, tensor in {**labelled, **({} if base is None else {"base": base})}.items():
        if tensor.shape != tensors[0].shape:
            found, expected = tuple(tensor.shape), tuple(tensors[0].shape)
            raise ValueError(f"{label}: found shape {found}; expected {expected}")
        if not all_finite(tensor):
            count = count_non_finite(tensor)
            raise ValueError(f"{label}: found {count} non-finite values; expected finite ones")
