r"""TALL masks: which entries of a merged task vector hold what one task needs.

Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression".
FlexMerge calls its use "Consensus": the merged vector is that of TIES, the threshold
0.6, and a task's weights are :math:`\theta_{pre} + m_k \circ \tau_{uni}`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks

DEFAULT_THRESHOLD = 0.6


def mask(delta: Tensor, unified: Tensor, threshold: float = DEFAULT_THRESHOLD) -> Tensor:
    r"""The TALL mask :math:`m_k = 1[\,|\tau_k| \ge \lambda\,|\tau_{uni} - \tau_k|\,]`.

    Args:
        delta: one part of the task vector, float32 or float64.
        unified: the same part of the merged task vector.
        threshold: lambda, at least 0; the larger, the less is kept. 0 keeps everything.

    Returns:
        bool, the shape of `delta`. Differences are float64, so that float32 inputs neither
        overflow nor round. An entry with NaN is not kept.

    The authors' code has ``>`` where the paper has ``>=``; the paper's is taken. They differ
    where both sides are equal: the entry is then within the rule, and with two zeros its value is
    zero either way.

    Raises:
        ValueError: `threshold` is negative or not finite.
    """
    if not 0.0 <= threshold < float("inf"):
        raise ValueError(f"threshold: found {threshold!r}; expected a finite number >= 0")
    flat, flat_unified = delta.reshape(-1), unified.reshape(-1)
    kept = torch.empty(flat.numel(), dtype=torch.bool, device=delta.device)
    for chunk in chunks(flat):
        task = flat[chunk].to(torch.float64)
        apart = (flat_unified[chunk].to(torch.float64) - task).abs_().mul_(threshold)
        kept[chunk] = task.abs() >= apart
    return kept.view(delta.shape)
