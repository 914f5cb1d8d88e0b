r"""Sparsify each change, then add up what agrees: TIES, DARE, DELLA, Breadcrumbs and pruning.

One form for all, that of mergekit's generalised task arithmetic: with
:math:`d_i = w_i\,\mathrm{sparsify}(t_i)`, the sum of the :math:`d_i` (with an election: of those
that have the sign of :math:`\sum_i d_i` in an entry), divided by the sum of their weights if
`normalize`, times `lambda`. `_FAMILY` says which method drops, elects and normalises what.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ext.core.parameters import Number, Parameter, Share, Switch, choice
from mergekit_ext.declared import ADAPTERS, BLOCKS, Call, Merged, Method, register
from mergekit_ext.declared.linear import BOUNDED_LAMBDA, LAMBDA, normalize, normalized
from mergekit_ext.declared.method import Pieces, Rows, divisor
from mergekit_ext.errors import Problem
from mergekit_ext.kernels.seeds import drop_and_rescale
from mergekit_ext.kernels.selection import EVERYTHING, Cut, Keeper, cut_for
from mergekit_ext.kernels.ties import TiesOptions, kept, made_up_for, merge_ties

DENSITY = Parameter("density", Share, 1.0, "share of the entries that is kept", per_model=True)
# The share that TIES keeps in FlexMerge (section 4).
FLEXMERGE_DENSITY = replace(DENSITY, default=0.1)
_BELOW_ONE, _BELOW_HALF = (Annotated[Number, Field(ge=0, lt=limit)] for limit in (1, 0.5))
_LARGEST = "share of the largest entries that is dropped"
GAMMA = Parameter("gamma", _BELOW_ONE, 0.01, _LARGEST, per_model=True)
_AROUND = "how far the probability of keeping an entry goes up and down from density"
EPSILON = Parameter("epsilon", _BELOW_HALF, 0.15, _AROUND, per_model=True)
_VOTES = "signs elected by the sum of the entries, or by their number"
_MAJORITY = Parameter("majority_sign_method", choice("total", "frequency"), "total", _VOTES)

# Is called with the pieces of a change, in order, and may change them in place.
Sparsified = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Change:
    source: Pieces
    generator: torch.Generator
    own: Mapping[str, Any]  # the per-model parameters of its adapter
    rescale: bool  # whether to make up for what is dropped

    @cached_property
    def size(self) -> int:
        return sum(piece.numel() for piece in self.source())

    def cut(self, keep: int) -> Cut:
        if not 0 < keep < self.size:
            return EVERYTHING
        return cut_for(lambda: (p.reshape(-1) for p in self.source()), keep, torch.float64)

    def rescaled(self, make: Callable[[], Sparsified]) -> Sparsified:
        """Return `make()`, with `rescale` scaled to the sum of magnitudes that there was."""
        if not self.rescale:
            return make()
        factor, sparsified = made_up_for(self.source(), make()), make()
        return lambda piece: sparsified(piece).mul_(factor)


_Prepare = Callable[[_Change], Sparsified]
_Add = Callable[[Sequence[Tensor], Call], Tensor]


def _keeping(cut: Cut) -> Sparsified:
    keeper = Keeper(cut)
    return lambda piece: keeper.drop(piece.reshape(-1)).reshape(piece.shape)


def _magnitude(change: _Change) -> Sparsified:
    cut = change.cut(kept(change.own["density"], change.size))
    return change.rescaled(lambda: _keeping(cut))


def _magnitude_outliers(change: _Change) -> Sparsified:
    # Drops the largest entries too; fewer of them where the density would not be reached.
    wanted = int(change.own["density"] * change.size)
    largest = min(int(change.own["gamma"] * change.size), change.size - wanted)
    if not wanted:
        return torch.zero_
    inner, outer = change.cut(wanted + largest), change.cut(largest)

    def make() -> Sparsified:
        keep, outliers = _keeping(inner), _keeping(outer)
        return lambda piece: keep(piece.clone()).sub_(outliers(piece)) if largest else keep(piece)

    return change.rescaled(make)


def _random(change: _Change) -> Sparsified:
    density = change.own["density"]
    if change.rescale:
        return lambda piece: drop_and_rescale(piece, density, change.generator)
    return lambda piece: drop_and_rescale(piece, density, change.generator).mul_(density)


def _by_rank(change: _Change) -> Sparsified:
    # Keeps an entry with a probability that grows with its rank within its row.
    density, epsilon, generator = change.own["density"], change.own["epsilon"], change.generator

    def sparsified(piece: Tensor) -> Tensor:
        rows = piece.reshape(-1, piece.shape[-1])
        order = rows.abs().argsort(dim=1, stable=True)
        least, most, count = density - epsilon, density + epsilon, rows.shape[1]
        steps = torch.linspace(least, most, count, dtype=piece.dtype, device=piece.device)
        if count == 1:
            steps.fill_(density)
        chance = torch.empty_like(rows).scatter_(1, order, steps.expand_as(rows))
        drawn = torch.rand(rows.shape, generator=generator, device=generator.device)
        rows = rows * (drawn.to(chance) < chance)
        return (rows.div_(chance) if change.rescale else rows).reshape(piece.shape)

    return sparsified


def spread_problems(own: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the problem of a `density` that `epsilon` leads to 0 or 1."""
    density, epsilon = own["density"], own.get("epsilon", 0)
    if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
        least = f"less than {min(density, 1 - density):g}"
        expected = f"{least}, which keeps density - epsilon and density + epsilon between 0 and 1"
        found = f"{epsilon:g} with a density of {density:g}"
        yield Problem("epsilon", found, expected, "Set a smaller `epsilon`.")


def _options(call: Call, elect: bool, rescale: bool = False) -> TiesOptions:
    return TiesOptions(elect, bool(call.options["normalize"]), rescale, call.options["lambda"])


def _sum(elect: bool) -> _Add:
    def add(deltas: Sequence[Tensor], call: Call) -> Tensor:
        start, everything = torch.zeros_like(deltas[0]), [1.0] * len(deltas)
        return merge_ties(start, deltas, call.weights, everything, _options(call, elect))

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


def _rows(prepare: _Prepare, add: _Add, rescale: bool | None, sums: bool) -> Rows:
    """Return the function that merges rows of all changes, some at a time.

    `rescale` is None where an option says it. If `sums`, the weights of all changes are divided by
    with `normalize`.
    """

    def merge(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
        if sums and call.options["normalize"] and any(call.weights):
            divisor(call.weights, "normalize: false")
        scaled = call.options["rescale"] if rescale is None else rescale
        functions = [
            prepare(_Change(source, generator, own, scaled))
            if own["density"] < 1
            else lambda piece: piece
            for source, generator, own in zip(sources, call.generators, call.each, strict=True)
        ]
        for pieces in zip(*(source() for source in sources), strict=True):
            yield add([f(piece) for f, piece in zip(functions, pieces, strict=True)], call)

    return merge


def _whole(rows: Rows) -> Callable[[Sequence[Tensor], Call], Merged]:
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


# name, paper, what drops entries, its parameters besides the density, whether signs are elected,
# defaults of `normalize` and `rescale`
_FAMILY = (
    ("ties", "2306.01708", _magnitude, (), True, True, False),
    ("magnitude_prune", "2306.01708", _magnitude, (), False, False, False),
    ("dare_ties", "2311.03099", _random, (), True, False, True),
    ("dare_linear", "2311.03099", _random, (), False, False, True),
    ("della", "2406.11617", _by_rank, (EPSILON,), True, True, True),
    ("della_linear", "2406.11617", _by_rank, (EPSILON,), False, False, True),
    ("breadcrumbs", "2312.06795", _magnitude_outliers, (GAMMA,), False, False, False),
    ("breadcrumbs_ties", "2312.06795", _magnitude_outliers, (GAMMA,), True, False, False),
)

_AGREEMENT = {True: "Inputs whose signs conflict; ", False: "Inputs that add up; "}
_DROPPED = {
    _magnitude: "small entries are noise.",
    _random: "most entries are redundant.",
    _by_rank: "most entries are redundant, small ones first.",
    _magnitude_outliers: "small entries are noise and the largest are outliers.",
}

for _name, _paper, _prepare, _own, _elects, _normal, _rescales in _FAMILY:
    _merge = _rows(_prepare, _sum(_elects), rescale=None, sums=not _elects)
    _rescale = Parameter("rescale", Switch, _rescales, "make up for what is dropped")
    _in_blocks = _name == "ties"
    register(
        Method(
            _name,
            _name,
            f"https://arxiv.org/abs/{_paper}",
            _whole(_merge),
            parameters=(DENSITY, *_own, normalize(_normal), _rescale, LAMBDA),
            drivers=frozenset({ADAPTERS, BLOCKS} if _in_blocks else {ADAPTERS}),
            variants={BLOCKS: {"density": FLEXMERGE_DENSITY, "lambda": BOUNDED_LAMBDA}},
            weighs=True,
            over_base=ties_over_base if _in_blocks else None,
            blockwise=_merge,
            trims=_in_blocks,
            check_each=spread_problems,
            divides=(lambda options: False) if _elects else normalized,
            use=_AGREEMENT[_elects] + _DROPPED[_prepare],
        )
    )

_OF_PEFT = (("peft_ties", _magnitude, False), ("peft_dare_ties", _random, True))
for _name, _prepare, _rescales in _OF_PEFT:
    _merge = _rows(_prepare, _agreeing_mean, rescale=_rescales, sums=False)
    register(
        Method(
            _name,
            _name,
            "https://huggingface.co/docs/peft/developer_guides/model_merging",
            _whole(_merge),
            parameters=(DENSITY, _MAJORITY),
            drivers=frozenset({ADAPTERS}),
            weighs=True,
            blockwise=_merge,
            use=f"What `{_name[5:]}` of PEFT's add_weighted_adapter is meant to give, exactly.",
        )
    )
