"""Cosine similarities of the task vectors of a block (FlexMerge, section 3.2), in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunk_length, compute_dtype
from mergekit_ext.kernels.threads import in_threads, scratch

# Cosines are rounded to multiples of this: well above the rounding of a float64 Gram matrix and far
# below what a cosine means, so that the rule for ties decides between equal ones, not noise.
_COSINE_GRID = 2.0**-36


class Gram:
    r"""Inner products :math:`G_{ij} = \langle t_i, t_j \rangle` of the task vectors of one block.

    With base tensors :math:`t_i = W_i - W_0`, without them :math:`t_i = W_i`; a block's vector is
    the concatenation of its tensors, so `add` is called once for each of them, in any order.

    Differences are formed in `compute_dtype`, products and sums in float64, where a product of two
    float32 numbers is exact and in range. (Of float64 inputs, entries above 1e154 overflow to
    infinity, and below 1e-162 their squares vanish.) NaN or infinity in an input makes its row and
    column non-finite.
    """

    def __init__(self, count: int):
        """``count``: the number m of task vectors, at least 1."""
        self._count = count
        self._total = torch.zeros(count, count, dtype=torch.float64)

    def add(self, tensors: Sequence[Tensor], base: Tensor | None = None) -> None:
        """Take in one tensor of the block, of each model and of the base: one shape and device."""
        sources = list(tensors) if base is None else [*tensors, base]
        dtype, device = compute_dtype(sources), sources[0].device
        flat = [tensor.reshape(-1) for tensor in tensors]
        flat_base = None if base is None else base.reshape(-1)
        size = flat[0].numel()
        step = max(1, chunk_length(device.type) // self._count)

        def products(start: int) -> Tensor:
            part = slice(start, min(start + step, size))
            length = part.stop - start
            vectors = scratch(self._count, length, torch.float64, device)
            if flat_base is not None:
                origin, delta = torch.empty((2, length), dtype=dtype, device=device)
                origin.copy_(flat_base[part])
            for row, source in zip(vectors, flat, strict=True):
                piece = source[part]
                row.copy_(piece if flat_base is None else torch.sub(piece, origin, out=delta))
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
    diagonal, rounded to multiples of 2**-36 (1.5e-11). Two zero vectors have 1, a zero and a
    non-zero one 0 (the paper does not say); one with a non-finite norm has NaN with all.
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
