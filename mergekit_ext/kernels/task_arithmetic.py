"""Weighted sums of task vectors and of weights, in one pass over the inputs.

Ilharco et al., "Editing Models with Task Arithmetic", section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks, compute_dtype
from mergekit_ext.kernels.threads import in_threads, scratch

# Entries of all sums of a chunk together: 8 MB in float32. Smaller would fit a core's own cache,
# but then the calls cost more than the sums.
_CACHED = 1 << 21


def weighted_sum(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    out_dtype: torch.dtype | None = None,
    base: Tensor | None = None,
) -> Tensor:
    r"""Return :math:`\sum_i c_i W_i`, or with a base :math:`W_0 + \sum_i c_i (W_i - W_0)`.

    Args:
        tensors: the :math:`W_i`, of one shape and device, any floating dtypes.
        coefficients: one :math:`c_i` for each tensor.
        out_dtype: dtype of the result; by default that of the base, or of the first tensor.
        base: :math:`W_0`, the shape and device of the tensors.

    Differences and sums are float32 (float64 if an input is float64) and are cast once. A model
    that equals the base adds exactly nothing. Scratch: three cache-sized chunks.
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
        flat_out[part] = total if flat_base is None else total.add_(start)

    in_threads(add, chunks(flat_out), like.device)
    return out


def nested_sums(
    base: Tensor,
    tensors: Mapping[int, Tensor],
    weights: Mapping[int, float],
    groups: Sequence[Sequence[int]],
    scales: Sequence[float],
    out: Tensor,
) -> Tensor:
    r"""Fill `out` with :math:`W_0 + s_g \sum_{i \in g} w_i (W_i - W_0)` for groups that grow.

    Args:
        base: :math:`W_0`, flat.
        tensors: the :math:`W_i` by index; the size and device of `base`.
        weights: the :math:`w_i` by index.
        groups: each the union of two disjoint ones before it, or of single indices.
        scales: one :math:`s_g` for each group.
        out: one row for each group, of any floating dtype.

    Returns:
        `out`. Each row costs one addition, whatever its size; all of them are made while a chunk
        of every input is in the cache. Rounding differs from that of `weighted_sum` in the order
        of the sum only.

    Raises:
        ValueError: a group is no such union.
    """
    dtype = compute_dtype([base, *tensors.values()])
    pairs = _unions(tensors, groups)
    rows = {index: row for row, index in enumerate(tensors)}
    step = max(1, _CACHED // (len(rows) + 2))

    def merge(start_at: int) -> None:
        part = slice(start_at, min(start_at + step, base.numel()))
        start, total, *sums = scratch(len(rows) + 2, part.stop - start_at, dtype, base.device)
        start.copy_(base[part])
        for delta, (index, source) in zip(sums, tensors.items(), strict=True):
            delta.copy_(source[part]).sub_(start)
            if weights[index] != 1:
                delta.mul_(weights[index])
        for row, ((first, second), scale) in enumerate(zip(pairs, scales, strict=True)):
            kept = sums[rows[first]].add_(sums[rows[second]])
            if out.dtype == dtype:
                torch.add(start, kept, alpha=scale, out=out[row, part])
            else:
                out[row, part] = torch.add(start, kept, alpha=scale, out=total)

    in_threads(merge, range(0, base.numel(), step), base.device)
    return out


def _unions(indices: Iterable[int], groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each group the indices at which the sums of its two parts lie."""
    place = {frozenset([index]): index for index in indices}
    pairs = []
    for group in groups:
        parts = [part for part in place if part <= set(group)]
        if len(parts) != 2 or parts[0] | parts[1] != set(group):
            raise ValueError(f"{tuple(group)} is not the union of two groups before it")
        first, second = (place.pop(part) for part in parts)
        place[frozenset(group)] = first
        pairs.append((first, second))
    return pairs
