r"""NAN: coefficients from inverse norms, for any weighted merge method F.

Si et al., "NAN: A Training-Free Solution to Coefficient Estimation in Model Merging", section 3.3:
:math:`a_i = (1/\|x_i\|_F) / \sum_j (1/\|x_j\|_F)`, x the task vectors, or the raw weights where
there is no base. Merged is ``W_0 + scale * F(a_1 w_1, ...; t_1, ...)``. See `kernels.nan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from mergekit_ext.core.parameters import Factor, Parameter, choice
from mergekit_ext.kernels.nan import default_scale
from mergekit_ext.kernels.task_arithmetic import weighted_sum
from mergekit_ext.methods.method import ADAPTERS, Call, Merged, Method, Pieces, Rows
from mergekit_ext.methods.registry import register

PAPER = "https://arxiv.org/abs/2505.16148"

NORM_OF = Parameter(
    "norm_of",
    choice("task_vector", "weights") | None,
    None,
    "whose norms: task_vector (default with a base) or weights (without)",
)
SCALE = Parameter(
    "scale",
    Factor | None,
    None,
    "global factor; default max(1, m/2) over a base for m inputs, 1 without",
)


def granularity(*names: str) -> Parameter:
    """Return what shares one set of coefficients: one of `names`, by default the first."""
    return Parameter("granularity", choice(*names), names[0], "what shares one set of coefficients")


_OF_ADAPTERS = (SCALE, granularity("tensor", "model"))


def _scale(call: Call) -> float:
    given = call.options["scale"]
    return default_scale(len(call.weights), has_base=True) if given is None else float(given)


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

    return replace(
        method,
        name=f"nan_{method.name}",
        merge=merged,
        parameters=(*method.parameters, *_OF_ADAPTERS),
        blockwise=None if method.blockwise is None else _scaled(method.blockwise),
        nan=True,
    )


def _scaled(blockwise: Rows) -> Rows:
    def rows(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
        scale = _scale(call)
        return (piece.mul_(scale) for piece in blockwise(sources, call))

    return rows


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
    )
)
