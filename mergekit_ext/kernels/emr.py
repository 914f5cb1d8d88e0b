r"""EMR-Merging: elect one unified task vector, mask it for each task, rescale what is left.

Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging". A task k has the
weights :math:`\theta_{pre} + \gamma_k\,(m_k \circ \tau_{uni})`, see
`mergekit_ext.kernels.masks.reconstruct`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks
from mergekit_ext.kernels.threads import in_threads

_Sums = tuple[float, float]


def unified(deltas: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    r"""The elected task vector :math:`\tau_{uni} = \gamma_{uni} \circ \epsilon_{uni}`.

    :math:`\gamma_{uni} = \mathrm{sgn}(\sum_k \tau_k)`, and :math:`\epsilon_{uni}` the largest
    magnitude among the :math:`\tau_k` with that sign, entry by entry.

    Args:
        deltas: m task vectors, each a sequence of parts; the parts of all have the same shapes
            and one dtype, float32 or float64.

    Returns:
        one tensor for each part. An entry where a task vector has NaN is NaN.

    Sums are float64. Where the task vectors cancel, sgn is 0 and so is the entry, as the equation
    says; the authors' code elects the negative sign there.
    """
    merged = []
    for parts in zip(*deltas, strict=True):
        out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        flat_out, flat = out.view(-1), [part.reshape(-1) for part in parts]
        for chunk in chunks(flat_out):
            pieces = [source[chunk] for source in flat]
            flat_out[chunk] = _elected(pieces)
        merged.append(out)
    return merged


def mask(delta: Tensor, unified: Tensor) -> Tensor:
    r"""Where a task agrees with the unified vector: :math:`m_k = 1[\tau_k \circ \tau_{uni} > 0]`.

    Args:
        delta: one part of the task vector.
        unified: the same part of the unified vector.

    Returns:
        bool, the shape of `delta`. Signs are compared, since the product may leave the range of
        the dtype.
    """
    positive = (delta > 0) & (unified > 0)
    return positive.logical_or_((delta < 0) & (unified < 0))


def rescale(delta: Sequence[Tensor], unified: Sequence[Tensor]) -> float:
    r"""The factor :math:`\gamma_k = \sum|\tau_k| \,/\, \sum|m_k \circ \tau_{uni}|`.

    Args:
        delta: the parts of the task vector.
        unified: the parts of the unified vector.

    Returns:
        a float. Both sums are float64 and run over all parts: in the authors' code they are sums
        of the means of each tensor, so that a bias weighs as much as a matrix. 0.0 for a task
        vector of zeros. 1.0 for one that agrees with the unified vector nowhere: nothing is then
        left to rescale.
    """
    whole, left = 0.0, 0.0
    for part, common in zip(delta, unified, strict=True):
        flat, flat_common = part.reshape(-1), common.reshape(-1)

        def sums(chunk: slice, flat: Tensor = flat, other: Tensor = flat_common) -> _Sums:
            piece, elected = flat[chunk], other[chunk]
            kept = elected.abs() * mask(piece, elected)
            return (
                float(piece.abs().sum(dtype=torch.float64)),
                float(kept.sum(dtype=torch.float64)),
            )

        for own, elected in in_threads(sums, chunks(flat), flat.device):
            whole, left = whole + own, left + elected
    if whole == 0.0:
        return 0.0
    return 1.0 if left == 0.0 else whole / left


def _elected(pieces: Sequence[Tensor]) -> Tensor:
    total = pieces[0].to(torch.float64, copy=True)
    largest, smallest = pieces[0], pieces[0]
    for piece in pieces[1:]:
        total.add_(piece)
        largest, smallest = torch.maximum(largest, piece), torch.minimum(smallest, piece)
    # A positive sum has a positive largest term: it is the largest magnitude of that sign. The
    # sum itself is left where it is zero, and where it is NaN.
    settled = torch.where(total < 0, smallest, total.to(smallest.dtype))
    return torch.where(total > 0, largest, settled)
