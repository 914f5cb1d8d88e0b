r"""NAN: coefficients from inverse norms, for any weighted merge method F.

Si et al., "NAN: A Training-Free Solution to Coefficient Estimation in Model Merging", section 3.3.
Merged is ``W_0 + scale * F(a_1 w_1, ...; t_1, ...)`` with the coefficients `a` of task vectors, or
of raw weights where there is no base.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from mergekit_ext.core.parameters import AUTO, Auto, Factor, Finite, Parameter, choice
from mergekit_ext.declared.method import ADAPTERS, Call, Merged, Method, Pieces, register
from mergekit_ext.errors import UniformCoefficientsWarning
from mergekit_ext.kernels.numerics import weighted_sum

_Group = TypeVar("_Group", bound=Hashable)
_Model = TypeVar("_Model", bound=Hashable)

PAPER = "https://arxiv.org/abs/2505.16148"
# The share of the sizes with equal coefficients that a user is warned of.
_MOST = 0.95

_NORMS = "whose norms: task_vector (default with a base) or weights (without)"
NORM_OF = Parameter("norm_of", choice("task_vector", "weights") | None, None, _NORMS)
_FACTOR = "global factor; auto: by norms, 1 without a base; paper: max(1, m/2) over a base"
SCALE = Parameter("scale", Factor | Auto | Literal["paper"], AUTO, _FACTOR)
# Of F in `nan_<method>`, where `scale` is the factor that norms decide.
LAMBDA = Parameter("lambda", Finite, 1.0, "factor of the method's result, beside `scale`")


def granularity(*names: str) -> Parameter:
    return Parameter("granularity", choice(*names), names[0], "what shares one set of coefficients")


_OF_ADAPTERS = (SCALE, granularity("tensor", "model"))


def inverse_norm_coefficients(norms: Sequence[float]) -> list[float]:
    r"""Return :math:`a_i = \frac{1/\|W_i\|_F}{\sum_j 1/\|W_j\|_F}` (equation 10).

    The norms are Frobenius norms of the m models' task vectors or weights. A task vector that is
    zero carries no information (the paper does not say): its coefficient is 0 and the others are
    normalised among themselves. If all are zero, so are all coefficients.

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


def scale_of(given: Any, models: int, has_base: bool = True) -> float:
    """Return the global factor; ``paper`` is max(1, m/2) over a base, else 1.

    The paper's factor m/2, "when merging a large number of models", would shrink one task vector.
    """
    if given == "paper":
        return max(1.0, models / 2) if has_base else 1.0
    return float(given)


def uniform(coefficients: Sequence[float], tolerance: float = 1e-2) -> bool:
    """Return whether all coefficients differ by less than `tolerance` of their mean."""
    if len(coefficients) < 2:
        return False
    mean = math.fsum(coefficients) / len(coefficients)
    return mean > 0 and max(coefficients) - min(coefficients) < tolerance * mean


def uniform_warning(
    method: str, measured: Sequence[tuple[int, Sequence[float]]], what: str, why: str
) -> UniformCoefficientsWarning | None:
    """Return a warning of coefficients that came out equal nearly everywhere, and `why`.

    `measured` has for each tensor its size, counted in `what`, and the models' coefficients.
    """
    size = sum(size for size, _ in measured)
    even = sum(size for size, coefficients in measured if uniform(coefficients))
    if not size or even < _MOST * size:
        return None
    return UniformCoefficientsWarning(
        f"{method}: the coefficients came out uniform (within 1%) for {even / size:.0%} of the "
        f"{what}, so that only `weight` and `scale` acted. {why}"
    )


def combine_norms(
    measured: Iterable[tuple[_Group, Mapping[_Model, float]]],
) -> dict[_Group, dict[_Model, float]]:
    """Return norms of whole groups from the group of each tensor and its norm in each model."""
    norms: dict[_Group, dict[_Model, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, values in measured:
        for model, norm in values.items():
            norms[key][model].append(norm)
    return {key: {m: math.hypot(*own) for m, own in of.items()} for key, of in norms.items()}


def _scale(call: Call) -> float:
    return scale_of(call.options["scale"], len(call.weights))


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    """Return ``scale * sum_i a_i w_i t_i``; the coefficients are in the weights already."""
    return Merged(weighted_sum(tensors, call.weights).mul_(_scale(call)))


def with_nan(method: Method) -> Method:
    """Return `nan_<method>` for adapters.

    The scale multiplies the result, not the weights: TIES and others divide by their sum.
    """

    def merged(tensors: Sequence[Tensor], call: Call) -> Merged:
        inner = method.merge(tensors, call)
        return replace(inner, tensor=inner.tensor * _scale(call))

    def rows(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
        assert method.blockwise is not None
        scale = _scale(call)
        return (piece.mul_(scale) for piece in method.blockwise(sources, call))

    return replace(
        method,
        name=f"nan_{method.name}",
        merge=merged,
        parameters=(
            *(LAMBDA if p.name == LAMBDA.name else p for p in method.parameters),
            *_OF_ADAPTERS,
        ),
        blockwise=None if method.blockwise is None else rows,
        nan=True,
    )


register(
    Method(
        "nan",
        "NAN",
        PAPER,
        merge,
        parameters=_OF_ADAPTERS,
        drivers=frozenset({ADAPTERS}),
        weighs=True,
        invariant=lambda options: True,
        nan=True,
        use="Inputs of unlike sizes without weights to choose: the larger, the less it counts.",
    )
)
