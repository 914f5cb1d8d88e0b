r"""Binary masks, one bit for each parameter: which rule makes them, packing, and what they select.

A task k that FlexMerge stores as a mask has the weights
:math:`\theta_{pre} + \gamma_k\,(m_k \circ \tau_{uni})`. EMR-Merging (Huang et al. 2024,
"EMR-Merging: Tuning-Free High-Performance Model Merging") elects the unified vector, masks it by
signs and rescales; Consensus takes the TIES vector, TALL masks (Wang et al. 2024, "Localizing Task
Information for Improved Model Merging and Compression") and :math:`\gamma_k = 1`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks, compute_dtype
from mergekit_ext.kernels.threads import in_threads

# Of TALL masks, as FlexMerge uses them.
DEFAULT_THRESHOLD = 0.6


def tall_mask(delta: Tensor, unified: Tensor, threshold: float = DEFAULT_THRESHOLD) -> Tensor:
    r"""Return the TALL mask :math:`m_k = 1[\,|\tau_k| \ge \lambda\,|\tau_{uni} - \tau_k|\,]`.

    bool, the shape of the task vector `delta`; `threshold` is lambda, at least 0. Differences are
    float64, so that float32 inputs neither overflow nor round. An entry with NaN is not kept.
    The authors' code has ``>`` where the paper has ``>=``, which is taken.
    """
    flat, flat_unified = delta.reshape(-1), unified.reshape(-1)
    kept = torch.empty(flat.numel(), dtype=torch.bool, device=delta.device)
    for chunk in chunks(flat):
        task = flat[chunk].to(torch.float64)
        apart = (flat_unified[chunk].to(torch.float64) - task).abs_().mul_(threshold)
        kept[chunk] = task.abs() >= apart
    return kept.view(delta.shape)


def elected(deltas: Sequence[Tensor]) -> Tensor:
    r"""Return EMR's task vector :math:`\tau_{uni} = \gamma_{uni} \circ \epsilon_{uni}`.

    :math:`\gamma_{uni} = \mathrm{sgn}(\sum_k \tau_k)`, and :math:`\epsilon_{uni}` the largest
    magnitude among the :math:`\tau_k` with that sign, entry by entry.

    The task vectors have one shape and dtype, float32 or float64, which is that of the result.
    An entry where one has NaN is NaN. Sums are float64. Where they cancel, sgn is 0 and so is the
    entry, as the equation says; the authors' code elects the negative sign there.
    """
    out = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    flat_out, flat = out.view(-1), [delta.reshape(-1) for delta in deltas]
    for chunk in chunks(flat_out):
        first, *others = [source[chunk] for source in flat]
        total = first.to(torch.float64, copy=True)
        largest = smallest = first
        for piece in others:
            total.add_(piece)
            largest, smallest = torch.maximum(largest, piece), torch.minimum(smallest, piece)
        # The largest term of a positive sum is the largest magnitude of that sign. The sum itself
        # is left where it is zero, and where it is NaN.
        settled = torch.where(total < 0, smallest, total.to(smallest.dtype))
        flat_out[chunk] = torch.where(total > 0, largest, settled)
    return out


def sign_mask(delta: Tensor, unified: Tensor) -> Tensor:
    r"""Return EMR's mask :math:`m_k = 1[\tau_k \circ \tau_{uni} > 0]`, bool.

    Signs are compared, since the product may leave the range of the dtype.
    """
    positive = (delta > 0) & (unified > 0)
    return positive.logical_or_((delta < 0) & (unified < 0))


def rescaler(delta: Tensor, unified: Tensor) -> float:
    r"""Return EMR's factor :math:`\gamma_k = \sum|\tau_k| \,/\, \sum|m_k \circ \tau_{uni}|`.

    Both sums are float64 and run over the whole block; in the authors' code they are sums of the
    means of each tensor, so that a bias weighs as much as a matrix. 0.0 for a task vector of
    zeros, 1.0 for one that agrees with the unified vector nowhere.
    """
    flat, flat_unified = delta.reshape(-1), unified.reshape(-1)

    def sums(chunk: slice) -> tuple[float, float]:
        piece, common = flat[chunk], flat_unified[chunk]
        kept = common.abs() * sign_mask(piece, common)
        own = float(piece.abs().sum(dtype=torch.float64))
        return own, float(kept.sum(dtype=torch.float64))

    whole, left = 0.0, 0.0
    for own, common in in_threads(sums, chunks(flat), flat.device):
        whole, left = whole + own, left + common
    if whole == 0.0:
        return 0.0
    return 1.0 if left == 0.0 else whole / left


def pack_bits(mask: Tensor) -> Tensor:
    """Return the n entries of a bool tensor as ``ceil(n / 8)`` bytes, uint8.

    Entry j is bit ``j % 8`` (from the least significant) of byte ``j // 8``; the bits after the
    last entry are zero.
    """
    packed = np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little")
    return torch.from_numpy(packed).to(mask.device)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` entries that `pack_bits` packed, bool, one-dimensional.

    Raises:
        ValueError: `packed` is not uint8, or has another number than ``ceil(count / 8)`` bytes.
    """
    if packed.dtype != torch.uint8 or count < 0 or packed.numel() != -(-count // 8):
        raise ValueError(
            f"packed: found {packed.numel()} of {packed.dtype} for {count} entries; expected one "
            "byte for every eight entries"
        )
    flat = packed.reshape(-1).cpu().numpy()
    bits = torch.from_numpy(np.unpackbits(flat, count=count, bitorder="little"))
    return bits.view(torch.bool).to(packed.device)


def reconstruct(
    base: Tensor, unified: Tensor, mask: Tensor, rescale: float, out_dtype: torch.dtype
) -> Tensor:
    r"""Return one task's weights, :math:`\hat\theta = \theta_{pre} + \gamma\,(m \circ \tau_{uni})`.

    FlexMerge, table 1. `unified` and `mask` (bool) have as many entries as `base`, whose shape the
    result has; `rescale` is gamma. Computed in float32 (float64 if an input is) and cast once. NaN
    or infinity in `unified` gives NaN even where the mask is off.
    """
    flat_base, flat, selected = base.reshape(-1), unified.reshape(-1), mask.reshape(-1)
    dtype = compute_dtype([base, unified])
    out = torch.empty(flat_base.numel(), dtype=out_dtype, device=base.device)
    for part in chunks(flat_base):
        task = flat[part].to(dtype) * selected[part]
        out[part] = task.mul_(rescale).add_(flat_base[part])
    return out.view(base.shape)
