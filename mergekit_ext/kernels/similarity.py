"""Cosine similarities of the task vectors of a block, from one pass over its tensors.

FlexMerge section 3.2 compares groups by the cosines of their original task vectors. All of them
come from one m x m matrix of inner products: m reads of a block, not m**2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import compute_dtype
from mergekit_ext.kernels.threads import in_threads, scratch

# float64 entries of the m x chunk buffer: 4 MB on a CPU, where it stays in cache between being
# filled and being multiplied; a GPU wants few, large kernels.
_CPU_BUFFER = 1 << 19
_ACCELERATOR_BUFFER = 1 << 26
# Cosines are rounded to multiples of this. It is well above the rounding of a float64 Gram matrix
# and far below what a cosine means, so that equal similarities are ties whatever the BLAS and the
# number of threads, and the rule for ties decides, not noise.
_COSINE_GRID = 2.0**-36


class Gram:
    r"""Inner products :math:`G_{ij} = \langle t_i, t_j \rangle` of the task vectors of one block.

    With base tensors :math:`t_i = W_i - W_0`, without them :math:`t_i = W_i`; a block's vector is
    the concatenation of its tensors, so `add` is called once for each of them, in any order.

    Differences are formed in `compute_dtype` (as every kernel forms task vectors), products and
    sums in float64. A product of two float32 numbers is exact in float64 and cannot leave its
    range: values of 1e19 do not overflow, 1e-30 does not vanish. (Of float64 inputs, entries
    above 1e154 overflow to infinity, and below 1e-162 their squares vanish.) NaN or infinity in an
    input makes its row and column non-finite.
    """

    def __init__(self, count: int):
        """``count``: the number m of task vectors, at least 1."""
        self._count = count
        self._total = torch.zeros(count, count, dtype=torch.float64)

    def add(self, tensors: Sequence[Tensor], base: Tensor | None = None) -> None:
        """Take in one tensor of the block, that of each of the m models, and that of the base.

        One shape, one device, any floating dtypes.
        """
        sources = list(tensors) if base is None else [*tensors, base]
        dtype, device = compute_dtype(sources), sources[0].device
        flat = [tensor.reshape(-1) for tensor in tensors]
        flat_base = None if base is None else base.reshape(-1)
        size = flat[0].numel()
        buffer = _CPU_BUFFER if device.type == "cpu" else _ACCELERATOR_BUFFER
        step = max(1, buffer // self._count)

        def products(start: int) -> Tensor:
            part = slice(start, min(start + step, size))
            length = part.stop - start
            vectors = scratch(self._count, length, torch.float64, device)
            if flat_base is None:
                for row, source in zip(vectors, flat, strict=True):
                    row.copy_(source[part])
            else:
                origin, delta = torch.empty((2, length), dtype=dtype, device=device)
                origin.copy_(flat_base[part])
                for row, source in zip(vectors, flat, strict=True):
                    row.copy_(torch.sub(source[part], origin, out=delta))
            return vectors @ vectors.T

        for product in in_threads(products, range(0, size, step), device):
            self._total += product.cpu()

    @property
    def value(self) -> Tensor:
        """The (m, m) matrix so far: float64, on the CPU, exactly symmetric."""
        return (self._total + self._total.T) / 2


def cosines(gram: Tensor) -> Tensor:
    r"""Return :math:`c_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}`.

    From the (m, m) inner products of `Gram.value`; (m, m) float64: symmetric, in [-1, 1], 1 on the
    diagonal, rounded to multiples of 2**-36 (1.5e-11).

    The paper does not say what a zero task vector is similar to. Two zero vectors are the same
    vector: 1. A zero and a non-zero one have nothing in common: 0. A vector with a non-finite norm
    has NaN with all, itself included.
    """
    gram = gram.to(torch.float64)
    squared = gram.diagonal()
    # Roots first: the product of two squared norms may leave the range, that of two norms cannot.
    norms = squared.sqrt()
    zero, broken = norms == 0, ~torch.isfinite(norms)
    found = gram / (norms[:, None] * norms)
    found = ((found / _COSINE_GRID).round() * _COSINE_GRID).clamp(-1, 1)
    one_zero, both_zero = zero[:, None] | zero, zero[:, None] & zero
    found = found.masked_fill(one_zero, 0.0).masked_fill(both_zero, 1.0)
    found.fill_diagonal_(1.0)
    return found.masked_fill(broken[:, None] | broken, torch.nan)
