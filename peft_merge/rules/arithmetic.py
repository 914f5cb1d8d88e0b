r"""Sparsify each change, then add up what agrees: TIES, DARE, DELLA, Breadcrumbs and pruning.

One form for all, that of mergekit's generalised task arithmetic: with
:math:`d_i = w_i\,\mathrm{sparsify}(D_i)`, the sum of the :math:`d_i` (with an election: of those
that have the sign of :math:`\sum_i d_i` in an entry), divided by the sum of their weights if
`normalize`, times `lambda`.

| rule | drops | elects | normalises |
|---|---|---|---|
| `ties` | small magnitudes | yes | yes |
| `magnitude_prune` | small magnitudes | no | no |
| `dare_ties`, `dare_linear` | at random | yes, no | no |
| `della`, `della_linear` | at random, small ones more likely | yes, no | yes, no |
| `breadcrumbs_ties`, `breadcrumbs` | small and the largest magnitudes | yes, no | no |

Yadav et al. 2023, "TIES-Merging", section 3; Yu et al. 2024, "Language Models are Super Mario";
Deep et al. 2024, "DELLA-Merging", section 3; Davari and Belilovsky 2024, "Model Breadcrumbs".

Names, parameters and defaults are mergekit's (`magnitude_prune`: PEFT's). *Departure:* with
`rescale`, DARE and DELLA divide what they keep by the probability of keeping it, as the papers
(and PEFT) do; mergekit scales it to the sum of magnitudes that the change had. For trimming by
magnitude, `rescale` is mergekit's.

Parts of a change: each matrix by itself, so that experts do not compete, and a bias by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.ties import TiesOptions, merge_ties
from peft_merge.rules.base import Call, Merged, Parameter, Pieces, Rule, register
from peft_merge.rules.parameters import LAMBDA, divided_by, normalize, normalized
from peft_merge.rules.sparsify import (
    BY_RANK,
    MAGNITUDE,
    MAGNITUDE_OUTLIERS,
    RANDOM,
    Sparsifier,
    sparsify,
)


def blockwise(
    sparsifier: Sparsifier, elect: bool
) -> Callable[[Sequence[Pieces], Call], Iterator[Tensor]]:
    """The merged rows from those of all changes, some at a time."""

    def merge(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
        options = TiesOptions(
            elect=elect, normalize=call.options["normalize"], factor=call.options["lambda"]
        )
        if options.normalize and not elect and any(call.weights):
            divided_by(call.weights, "normalize: false")
        functions = [
            sparsify(sparsifier, source, generator, own, call.options["rescale"])
            for source, generator, own in zip(sources, call.generators, call.each, strict=True)
        ]
        everything = [1.0] * len(sources)
        for pieces in zip(*(source() for source in sources), strict=True):
            deltas = [function(piece) for function, piece in zip(functions, pieces, strict=True)]
            nothing = torch.zeros_like(pieces[0])
            yield merge_ties(nothing, deltas, call.weights, everything, options)

    return merge


def whole(
    rows: Callable[[Sequence[Pieces], Call], Iterator[Tensor]],
) -> Callable[[Sequence[Tensor], Call], Merged]:
    """The rule for tensors that are there."""

    def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
        sources = [_pieces(tensor) for tensor in tensors]
        (merged,) = rows(sources, call)
        return Merged(merged)

    return merge


def _pieces(tensor: Tensor) -> Pieces:
    return lambda: iter((tensor.to(torch.float64, copy=True),))


def _rule(name: str, sparsifier: Sparsifier, elect: bool, normal: bool, rescale: bool) -> Rule:
    rows = blockwise(sparsifier, elect)
    return Rule(
        name,
        whole(rows),
        invariant=False,
        parameters=(
            *sparsifier.parameters,
            normalize(normal),
            Parameter("rescale", bool, rescale, help="make up for what is dropped"),
            LAMBDA,
        ),
        check_each=lambda options, own: sparsifier.check(own),
        blockwise=rows,
        divides=(lambda options: False) if elect else normalized,
    )


# name, what is dropped, whether signs are elected, defaults of `normalize` and `rescale`
_FAMILY = (
    ("ties", MAGNITUDE, True, True, False),
    ("magnitude_prune", MAGNITUDE, False, False, False),
    ("dare_ties", RANDOM, True, False, True),
    ("dare_linear", RANDOM, False, False, True),
    ("della", BY_RANK, True, True, True),
    ("della_linear", BY_RANK, False, False, True),
    ("breadcrumbs", MAGNITUDE_OUTLIERS, False, False, False),
    ("breadcrumbs_ties", MAGNITUDE_OUTLIERS, True, False, False),
)

for _row in _FAMILY:
    register(_rule(*_row))
