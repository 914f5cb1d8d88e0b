"""DARE: drop entries of a task vector at random and rescale the others.

Yu et al. 2024, "Language Models are Super Mario".
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import compute_dtype


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    r"""Return :math:`m \circ \delta / (1 - p)`, :math:`m_j \sim` Bernoulli(:math:`1 - p`).

    Args:
        delta: any shape and floating dtype.
        density: :math:`1 - p` in (0, 1], the probability of keeping an entry (the paper writes
            the drop rate p). With 1 everything is kept and nothing is drawn.
        generator: where the random numbers come from. They are drawn on its device, one for each
            entry in order, so that a seed drops the same entries wherever `delta` is.

    Returns:
        a new tensor in float32 (float64 for float64), expectation `delta`. NaN and infinity come
        out as NaN where they are dropped.

    Raises:
        ValueError: `density` is out of range.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density: found {density!r}; expected a number above 0, at most 1")
    scaled = delta.to(compute_dtype([delta]), copy=True)
    if density == 1.0:
        return scaled
    drawn = torch.rand(delta.shape, generator=generator, device=generator.device)
    return scaled.div_(density).mul_((drawn < density).to(delta.device))
