"""Binary masks, one bit for each parameter, and the weights that they select."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks, compute_dtype

# Eight bytes of 0 or 1, read as one little-endian integer, times this: its top byte has byte i in
# bit i. No two of the partial products meet, so nothing is carried.
_GATHER_BITS = 0x0102040810204080
_REPEAT_BYTE = 0x0101010101010101
# Bit i of byte i, for i from 0 to 7; the sign bit is one of them.
_ONE_BIT_EACH = 0x8040201008040201 - (1 << 64)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight entries of `mask` a byte.

    Args:
        mask: bool, any shape, n entries.

    Returns:
        uint8, ``ceil(n / 8)`` bytes. Entry j is bit ``j % 8`` (from the least significant) of
        byte ``j // 8``; the bits after the last entry are zero.

    Raises:
        TypeError: `mask` is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: found dtype {mask.dtype}; expected torch.bool")
    flat = mask.reshape(-1)
    packed = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8, device=mask.device)
    for part in chunks(flat):
        piece = flat[part]
        # The length of a chunk is a multiple of 8, except for the last one.
        if piece.numel() % 8:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 8))
        words = _as_words(piece.view(torch.uint8))
        first = part.start // 8
        packed[first : first + words.numel()] = ((words * _GATHER_BITS) >> 56) & 0xFF
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` entries that `pack_bits` packed, bool, one-dimensional.

    Args:
        packed: uint8, ``ceil(count / 8)`` bytes.
        count: how many entries.

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: `packed` has another number of bytes.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: found dtype {packed.dtype}; expected torch.uint8")
    if count < 0 or packed.numel() != -(-count // 8):
        raise ValueError(
            f"packed: found {packed.numel()} bytes for {count} entries; expected one byte for "
            "every eight entries"
        )
    flat = packed.reshape(-1)
    bits = torch.empty(8 * flat.numel(), dtype=torch.bool, device=packed.device)
    for part in chunks(flat):
        words = (flat[part].to(torch.int64) * _REPEAT_BYTE) & _ONE_BIT_EACH
        bits[8 * part.start : 8 * part.start + 8 * words.numel()] = words.view(torch.uint8) != 0
    return bits[:count]


def reconstruct(
    base: Tensor, unified: Tensor, mask: Tensor, rescale: float, out_dtype: torch.dtype
) -> Tensor:
    r"""One task's weights, :math:`\hat\theta = \theta_{pre} + \gamma\,(m \circ \tau_{uni})`.

    FlexMerge, table 1: gamma is EMR's rescaler, and 1 for Consensus.

    Args:
        base: any shape, any floating dtype.
        unified: as many entries as `base`, any floating dtype.
        mask: bool, as many entries as `base`.
        rescale: gamma.
        out_dtype: dtype of the result.

    Returns:
        the shape of `base`, computed in float32 (float64 if an input is) and cast once. NaN or
        infinity in `unified` gives NaN even where the mask is off.

    Raises:
        ValueError: the numbers of entries differ.
    """
    flat_base, flat, selected = base.reshape(-1), unified.reshape(-1), mask.reshape(-1)
    for name, other in (("unified", flat), ("mask", selected)):
        if other.numel() != flat_base.numel():
            raise ValueError(
                f"{name}: found {other.numel()} entries; expected {flat_base.numel()}, as in base"
            )
    dtype = compute_dtype([base, unified])
    out = torch.empty(flat_base.numel(), dtype=out_dtype, device=base.device)
    for part in chunks(flat_base):
        task = flat[part].to(dtype) * selected[part]
        out[part] = task.mul_(rescale).add_(flat_base[part])
    return out.view(base.shape)


def _as_words(octets: Tensor) -> Tensor:
    """Bytes, a multiple of eight of them, as 64-bit integers."""
    # A view needs memory that starts at a multiple of eight bytes, which a slice may not.
    aligned = octets if octets.storage_offset() % 8 == 0 else octets.clone()
    return aligned.contiguous().view(torch.int64)
