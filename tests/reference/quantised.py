"""Formats of quantised weights in float64, number by number, and how their codes are stored.

fp8 in blocks: arXiv:2412.19437, section 3.3. GPTQ: arXiv:2210.17323, in the files of AutoGPTQ
(format `gptq`, whose zero points are stored less one, and `gptq_v2`). AWQ: arXiv:2306.00978, in the
layout that AutoAWQ calls GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def from_blocks(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    out = torch.empty(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] = codes[i, j].double() * scales[i // block[0], j // block[1]].double()
    return out


def from_groups(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """Return the weight (out, in) of codes (in, out), and values (groups, out)."""
    out = torch.empty(codes.shape[::-1], dtype=torch.float64)
    for i in range(codes.shape[0]):
        g = int(groups[i])
        for o in range(codes.shape[1]):
            out[o, i] = (int(codes[i, o]) - int(zeros[g, o])) * scales[g, o].double()
    return out


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Return the rows of `numbers` as one string of bits each column, lowest first, in int32."""
    words = []
    for column in numbers.T.tolist():
        string = sum(number << bits * at for at, number in enumerate(column))
        count = len(column) * bits // 32
        words.append([string >> 32 * at & 0xFFFFFFFF for at in range(count)])
    signed = torch.tensor(words, dtype=torch.int64)
    return torch.where(signed >= 2**31, signed - 2**32, signed).to(torch.int32).T.contiguous()


def packed_as_awq(numbers: Tensor) -> Tensor:
    """Return columns of 4 bits in words of eight, (rows, columns / 8)."""
    ordered = numbers.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1)
    return packed(ordered.T, 4).T.contiguous()
