r"""Sparsify each change, then add up what agrees: TIES, DARE, DELLA, Breadcrumbs and pruning.

One form for all, that of mergekit's generalised task arithmetic: with
:math:`d_i = w_i\,\mathrm{sparsify}(t_i)`, the sum of the :math:`d_i` (with an election: of those
that have the sign of :math:`\sum_i d_i` in an entry), divided by the sum of their weights if
`normalize`, times `lambda`.

| method | drops | elects | normalises |
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

`peft_ties` and `peft_dare_ties` are those of PEFT's `add_weighted_adapter`
(utils/merge_utils.py): signs are elected by the changes as they are, and the weighted values that
agree are divided by their number. With :math:`s_i = \mathrm{sparsify}(t_i)`, entry by entry,

.. math:: \gamma = \operatorname{sign} \sum_i s_i, \qquad
    \frac{\sum_{i:\, \operatorname{sign} s_i = \gamma} w_i s_i}
         {|\{i: \operatorname{sign} s_i = \gamma\}|}

(:math:`\gamma = 1` where the sum is 0). With `majority_sign_method: frequency`, the sign is that
of :math:`\sum_i \operatorname{sign} s_i`.

Each matrix of an adapter's module is sparsified by itself, so that experts do not compete, and a
bias by itself. In FlexMerge only `ties` is one of these; the others are mergekit's there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_ext.core.parameters import Parameter, Switch, choice
from mergekit_ext.kernels.ties import TiesOptions, merge_ties
from mergekit_ext.methods.linear import BOUNDED_LAMBDA, LAMBDA, normalize, normalized
from mergekit_ext.methods.method import (
    ADAPTERS,
    BLOCKS,
    Call,
    Merged,
    Method,
    Pieces,
    Rows,
    divided_by,
    register,
)
from mergekit_ext.methods.sparsify import (
    BY_RANK,
    FLEXMERGE_DENSITY,
    MAGNITUDE,
    MAGNITUDE_OUTLIERS,
    RANDOM,
    Sparsifier,
)

_MAJORITY = Parameter(
    "majority_sign_method",
    choice("total", "frequency"),
    "total",
    "signs elected by the sum of the entries, or by their number",
)


def _options(call: Call, elect: bool, rescale: bool = False) -> TiesOptions:
    normal = bool(call.options["normalize"])
    return TiesOptions(
        elect=elect, normalize=normal, rescale=rescale, factor=call.options["lambda"]
    )


def _sum(elect: bool) -> Callable[[Sequence[Tensor], Call], Tensor]:
    """Return the function that adds up sparsified changes."""

    def add(deltas: Sequence[Tensor], call: Call) -> Tensor:
        everything = [1.0] * len(deltas)
        options = _options(call, elect)
        return merge_ties(torch.zeros_like(deltas[0]), deltas, call.weights, everything, options)

    return add


def _agreeing_mean(tensors: Sequence[Tensor], call: Call) -> Tensor:
    by_number = call.options["majority_sign_method"] == "frequency"
    votes = torch.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor.sign() if by_number else tensor
    sign = torch.where(votes >= 0, 1.0, -1.0).to(votes)
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for tensor, weight in zip(tensors, call.weights, strict=True):
        agrees = tensor.sign() == sign
        total.add_(tensor * agrees, alpha=weight)
        count += agrees
    return total.div_(count.clamp_(min=1))


def _rows(
    sparsifier: Sparsifier,
    add: Callable[[Sequence[Tensor], Call], Tensor],
    rescale: bool | None,
    sums: bool,
) -> Rows:
    """Return the function that merges rows of all changes, some at a time.

    Args:
        add: merges sparsified rows.
        rescale: whether to make up for what is dropped; None where an option says it.
        sums: whether, with `normalize`, the weights of all changes are divided by.
    """

    def merge(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
        if sums and call.options["normalize"] and any(call.weights):
            divided_by(call.weights, "normalize: false")
        scaled = call.options["rescale"] if rescale is None else rescale
        functions = [
            sparsifier.of(source, generator, own, scaled)
            for source, generator, own in zip(sources, call.generators, call.each, strict=True)
        ]
        for pieces in zip(*(source() for source in sources), strict=True):
            yield add([f(piece) for f, piece in zip(functions, pieces, strict=True)], call)

    return merge


def _whole(rows: Rows) -> Callable[[Sequence[Tensor], Call], Merged]:
    """Return the function for tensors that are in memory."""

    def pieces(tensor: Tensor) -> Pieces:
        return lambda: iter((tensor.to(torch.float64, copy=True),))

    def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
        (merged,) = rows(list(map(pieces, tensors)), call)
        return Merged(merged)

    return merge


def ties_over_base(
    base: Tensor | None, models: Sequence[Tensor], call: Call, dtype: torch.dtype
) -> Merged:
    """Merge stored tensors by TIES: see `kernels.ties.merge_ties`."""
    assert base is not None
    options = _options(call, elect=True, rescale=call.options["rescale"])
    return Merged(merge_ties(base, models, call.weights, call.kept, options, dtype))


# name, what is dropped, whether signs are elected, defaults of `normalize` and `rescale`
_FAMILY = (
    ("ties", "2306.01708", MAGNITUDE, True, True, False),
    ("magnitude_prune", "2306.01708", MAGNITUDE, False, False, False),
    ("dare_ties", "2311.03099", RANDOM, True, False, True),
    ("dare_linear", "2311.03099", RANDOM, False, False, True),
    ("della", "2406.11617", BY_RANK, True, True, True),
    ("della_linear", "2406.11617", BY_RANK, False, False, True),
    ("breadcrumbs", "2312.06795", MAGNITUDE_OUTLIERS, False, False, False),
    ("breadcrumbs_ties", "2312.06795", MAGNITUDE_OUTLIERS, True, False, False),
)

for _name, _paper, _sparsifier, _elects, _normal, _rescales in _FAMILY:
    _merge = _rows(_sparsifier, _sum(_elects), rescale=None, sums=not _elects)
    _in_blocks = _name == "ties"
    register(
        Method(
            _name,
            _name,
            f"https://arxiv.org/abs/{_paper}",
            _whole(_merge),
            parameters=(
                *_sparsifier.parameters,
                normalize(_normal),
                Parameter("rescale", Switch, _rescales, "make up for what is dropped"),
                LAMBDA,
            ),
            drivers=frozenset({ADAPTERS, BLOCKS} if _in_blocks else {ADAPTERS}),
            variants={BLOCKS: {"density": FLEXMERGE_DENSITY, "lambda": BOUNDED_LAMBDA}},
            weighs=True,
            over_base=ties_over_base if _in_blocks else None,
            blockwise=_merge,
            trims=_in_blocks,
            check_each=_sparsifier.check,
            divides=(lambda options: False) if _elects else normalized,
        )
    )

for _name, _sparsifier, _rescales in (
    ("peft_ties", MAGNITUDE, False),
    ("peft_dare_ties", RANDOM, True),
):
    _merge = _rows(_sparsifier, _agreeing_mean, rescale=_rescales, sums=False)
    register(
        Method(
            _name,
            _name,
            "https://huggingface.co/docs/peft/developer_guides/model_merging",
            _whole(_merge),
            parameters=(*_sparsifier.parameters, _MAJORITY),
            drivers=frozenset({ADAPTERS}),
            weighs=True,
            blockwise=_merge,
        )
    )
