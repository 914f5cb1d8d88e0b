"""NAN: merging coefficients from inverse norms.

Si et al., "NAN: A Training-Free Solution to Coefficient Estimation in Model Merging", section 3.3.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

_Group = TypeVar("_Group", bound=Hashable)
_Model = TypeVar("_Model", bound=Hashable)


def inverse_norm_coefficients(norms: Sequence[float]) -> list[float]:
    r"""Return :math:`a_i = \frac{1/\|W_i\|_F}{\sum_j 1/\|W_j\|_F}` (equation 10).

    Args:
        norms: Frobenius norms of the m models' task vectors or weights; each finite, at least 0.

    Returns:
        m coefficients that are at least 0 and sum to 1. They depend on the ratios of the norms
        only.

    The paper does not say what a zero norm means. A task vector that is zero carries no
    information: its coefficient is 0 and the others are normalised among themselves. If all are
    zero, all coefficients are 0, and the caller returns the base.

    Raises:
        ValueError: a norm is negative, NaN or infinite.
    """
    for position, norm in enumerate(norms):
        if not (math.isfinite(norm) and norm >= 0):
            raise ValueError(f"norms[{position}] is {norm}; expected a finite number, at least 0")
    positive = [norm for norm in norms if norm > 0]
    if not positive:
        return [0.0] * len(norms)
    # Relative to the smallest norm, no inverse overflows, however small the norms are.
    smallest = min(positive)
    inverse = [smallest / norm if norm > 0 else 0.0 for norm in norms]
    total = math.fsum(inverse)
    return [value / total for value in inverse]


def default_scale(models: int, has_base: bool) -> float:
    """The global factor when the user gives none: max(1, m/2) over a base, else 1.

    The paper's factor is m/2, "when merging a large number of models"; below two models it would
    shrink the only task vector. Raw weights times m/2 are not a model.
    """
    return max(1.0, models / 2) if has_base else 1.0


def uniform(coefficients: Sequence[float], tolerance: float = 1e-2) -> bool:
    """Whether all coefficients differ by less than `tolerance` of their mean."""
    if len(coefficients) < 2:
        return False
    mean = math.fsum(coefficients) / len(coefficients)
    return mean > 0 and max(coefficients) - min(coefficients) < tolerance * mean


def combine_norms(
    measured: Iterable[tuple[_Group, Mapping[_Model, float]]],
) -> dict[_Group, dict[_Model, float]]:
    """Norms of whole groups from those of their tensors: the root of the sum of squares.

    Args:
        measured: for each tensor the key of its group, and the norm of each model.
    """
    norms: dict[_Group, dict[_Model, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, values in measured:
        for model, norm in values.items():
            norms[key][model].append(norm)
    return {
        key: {model: math.hypot(*values) for model, values in models.items()}
        for key, models in norms.items()
    }
