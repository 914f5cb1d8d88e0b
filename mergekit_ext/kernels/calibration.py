r"""How far a merge over a base goes, and the factor that takes it as far as norms alone suggest.

rho is the norm of the merged task vector over the mean norm n of its m inputs that are not zero.
With c, the norm of their mean, `auto_factor` makes it :math:`\sqrt{(1 + (c/n)^2)/2}`: 1 for vectors
that are alike, and 0.71 to 0.87 for orthogonal ones. Not from a paper: docs/methods.md has what was
measured. Where a method makes its inputs' parts orthogonal to each other, their squares add up, and
:math:`\sqrt m` comes in.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks, compute_dtype, squared_norms, weighted_sum


def norms_of(tensors: Sequence[Tensor], base: Tensor) -> list[float]:
    """Return ``||t - base||_F`` of each tensor."""
    return [math.sqrt(square) for square in squared_norms(tensors, base)]


def auto_factor(merged: float, norms: Sequence[float], total: float, orthogonal: bool) -> float:
    """Return the factor of a merged vector; 1 if it is zero. `total` is the norm of the sum."""
    count = sum(norm > 0 for norm in norms) or 1
    wanted = math.hypot(math.fsum(norms), total) / count / math.sqrt(2)
    return wanted * (math.sqrt(count) if orthogonal else 1) / merged if merged else 1.0


def calibrated(
    merged: Tensor,
    length: float,
    models: Sequence[Tensor],
    norms: Sequence[float],
    base: Tensor,
    dtype: torch.dtype,
    orthogonal: bool,
) -> tuple[Tensor, float]:
    """Return ``base + c (merged - base)`` in `dtype`, and c, the `auto_factor`.

    `length` and `norms` are those of the differences of `merged` and `models` from the base.
    """
    if not length:  # the base, its negative zeros too
        return merged.to(dtype), 1.0
    flat, wide = [t.reshape(-1) for t in (*models, base)], compute_dtype([*models, base])
    weights = [*([1.0] * len(models)), -float(len(models))]
    sums = (weighted_sum([t[part] for t in flat], weights, wide) for part in chunks(base))
    total = math.sqrt(math.fsum(square for each in sums for square in squared_norms([each])))
    factor = auto_factor(length, norms, total, orthogonal)
    return weighted_sum([merged], [factor], dtype, base), factor


def distance(
    merged: float, inputs: Mapping[str, float], factor: Mapping[str, Any], orthogonal: bool = False
) -> dict[str, Any]:
    """Return how far a merge went, for `report.rho`; nothing beyond the range of float64.

    `merged` and `inputs` are norms of task vectors; `factor` is the parameter that multiplies the
    merged one, if there is one, and its value.
    """
    norms = {name: norm for name, norm in inputs.items() if norm}
    if not norms or not all(map(math.isfinite, (merged, *norms.values()))):
        return {}
    numbers = {name: value for name, value in factor.items() if isinstance(value, (int, float))}
    usual = math.sqrt(len(norms)) if orthogonal else 1.0
    return {"distance": {"merged": merged, "inputs": norms, "factor": numbers, "usual": usual}}
