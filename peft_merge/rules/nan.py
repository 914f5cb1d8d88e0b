"""NAN: `nan`, and `nan_<rule>` for every other rule.

Si et al., "NAN: A Training-Free Solution to Coefficient Estimation in Model Merging", section 3.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from mergekit_ext.kernels.lore_combine import weighted_sum
from mergekit_ext.kernels.nan import default_scale
from peft_merge.rules import base
from peft_merge.rules.base import Call, Merged, Parameter, Pieces, Rule, register

# Wide enough for every use, and no product of it leaves float32.
_LARGEST_SCALE = 1e6

PARAMETERS = (
    Parameter(
        "scale",
        float,
        None,
        low=-_LARGEST_SCALE,
        high=_LARGEST_SCALE,
        help="global factor; default max(1, m/2) for m adapters",
    ),
    Parameter(
        "granularity",
        str,
        "tensor",
        choices=("tensor", "model"),
        help="what shares one set of coefficients: each module, or whole adapters",
    ),
)


def _scale(call: Call) -> float:
    given = call.options["scale"]
    return default_scale(len(call.weights), has_base=True) if given is None else float(given)


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""`nan`: ``scale * sum_i a_i w_i D_i``.

    The coefficients :math:`a_i = (1/\|D_i\|_F) / \sum_j (1/\|D_j\|_F)` are in the weights already,
    see `peft_merge.coefficients`.
    """
    return Merged(weighted_sum(tensors, call.weights).mul_(_scale(call)))


def with_nan(rule: Rule) -> Rule:
    """`nan_<rule>`: ``scale * F(a_1 w_1, ...; D_1, ...)``, F being the rule.

    The scale multiplies the result, not the weights: TIES and others divide by their sum.
    """

    def merged(tensors: Sequence[Tensor], call: Call) -> Merged:
        inner = rule.merge(tensors, call)
        return dataclasses.replace(inner, tensor=inner.tensor * _scale(call))

    return dataclasses.replace(
        rule,
        name=f"nan_{rule.name}",
        merge=merged,
        parameters=(*rule.parameters, *PARAMETERS),
        blockwise=None if rule.blockwise is None else _scaled(rule.blockwise),
        coefficients="nan",
    )


def _scaled(
    blockwise: Callable[[Sequence[Pieces], Call], Iterator[Tensor]],
) -> Callable[[Sequence[Pieces], Call], Iterator[Tensor]]:
    def pieces(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
        scale = _scale(call)
        return (piece.mul_(scale) for piece in blockwise(sources, call))

    return pieces


for _rule in base.registered():
    register(with_nan(_rule))
register(Rule("nan", merge, invariant=True, parameters=PARAMETERS, coefficients="nan"))
