r"""TIES and DARE-TIES as PEFT's `add_weighted_adapter` defines them: `peft_ties`, `peft_dare_ties`.

Yadav et al. 2023, "TIES-Merging", section 3; Yu et al. 2024, "Language Models are Super Mario".
PEFT (utils/merge_utils.py) departs from mergekit's `ties` in the weights: signs are elected by
the changes as they are, and the weighted values that agree are divided by their number, not by
the sum of their weights. With :math:`t_i = \mathrm{sparsify}(D_i)`, entry by entry,

.. math:: s = \operatorname{sign} \sum_i t_i, \qquad
    \frac{\sum_{i:\, \operatorname{sign} t_i = s} w_i t_i}{|\{i: \operatorname{sign} t_i = s\}|}

(:math:`s = 1` where the sum is 0). With `majority_sign_method: frequency` s is the sign of
:math:`\sum_i \operatorname{sign} t_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from peft_merge.rules.arithmetic import whole
from peft_merge.rules.base import Call, Parameter, Pieces, Rule, register
from peft_merge.rules.sparsify import MAGNITUDE, RANDOM, Sparsifier, sparsify

_MAJORITY = Parameter(
    "majority_sign_method",
    str,
    "total",
    choices=("total", "frequency"),
    help="signs elected by the sum of the entries, or by their number",
)


def blockwise(
    sparsifier: Sparsifier, rescale: bool
) -> Callable[[Sequence[Pieces], Call], Iterator[Tensor]]:
    """The merged rows from those of all changes, some at a time."""

    def merge(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
        functions = [
            sparsify(sparsifier, source, generator, own, rescale)
            for source, generator, own in zip(sources, call.generators, call.each, strict=True)
        ]
        by_number = call.options["majority_sign_method"] == "frequency"
        for pieces in zip(*(source() for source in sources), strict=True):
            trimmed = [function(piece) for function, piece in zip(functions, pieces, strict=True)]
            yield _agreeing_mean(trimmed, call.weights, by_number)

    return merge


def _agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], by_number: bool) -> Tensor:
    votes = torch.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor.sign() if by_number else tensor
    sign = torch.where(votes >= 0, 1.0, -1.0).to(votes)
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == sign
        total.add_(tensor * agrees, alpha=weight)
        count += agrees
    return total.div_(count.clamp_(min=1))


# name, what is dropped, whether the rest makes up for it
_FAMILY = (("peft_ties", MAGNITUDE, False), ("peft_dare_ties", RANDOM, True))

for _name, _sparsifier, _rescale in _FAMILY:
    _rows = blockwise(_sparsifier, _rescale)
    register(
        Rule(
            _name,
            whole(_rows),
            invariant=False,
            parameters=(*_sparsifier.parameters, _MAJORITY),
            blockwise=_rows,
        )
    )
