"""Sparsifiers: which entries of one change are kept, seen in pieces.

A sparsifier looks at a change as often as it needs, and returns a function that is called with its
pieces once more, in order, and may change them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ext.core.parameters import Number, Parameter, Share
from mergekit_ext.errors import Problem
from mergekit_ext.kernels.linear_algebra import total
from mergekit_ext.kernels.seeds import drop_and_rescale
from mergekit_ext.kernels.selection import EVERYTHING, Cut, Keeper, cut_for
from mergekit_ext.kernels.ties import RESCALE_FROM, kept
from mergekit_ext.methods.method import Pieces

Sparsified = Callable[[Tensor], Tensor]

DENSITY = Parameter("density", Share, 1.0, "share of the entries that is kept", per_model=True)
# The share that TIES and PCB keep in FlexMerge (section 4).
FLEXMERGE_DENSITY = replace(DENSITY, default=0.1)
GAMMA = Parameter(
    "gamma",
    Annotated[Number, Field(ge=0, lt=1)],
    0.01,
    "share of the largest entries that is dropped",
    per_model=True,
)
EPSILON = Parameter(
    "epsilon",
    Annotated[Number, Field(ge=0, lt=0.5)],
    0.15,
    "how far the probability of keeping an entry goes up and down from density",
    per_model=True,
)


Prepare = Callable[[Pieces, torch.Generator, Mapping[str, Any], bool], Sparsified]


@dataclass(frozen=True)
class Sparsifier:
    """One way to drop entries.

    Attributes:
        prepare: ``prepare(source, generator, own, rescale)``, `own` being the per-model
            parameters of one adapter. Not called at a density of 1, which keeps everything.
        parameters: those that it reads.
        check: what is wrong with one adapter's parameters.
    """

    prepare: Prepare
    parameters: tuple[Parameter, ...]
    check: Callable[[Mapping[str, Any]], Iterable[Problem]] = lambda own: ()

    def of(
        self,
        source: Pieces,
        generator: torch.Generator,
        own: Mapping[str, Any],
        rescale: bool,
    ) -> Sparsified:
        """Return the function for the pieces of `source`."""
        if own["density"] >= 1.0:
            return lambda piece: piece
        return self.prepare(source, generator, own, rescale)


def _magnitude(
    source: Pieces, generator: torch.Generator, own: Mapping[str, Any], rescale: bool
) -> Sparsified:
    size = _size(source)
    cut = _cut(source, kept(own["density"], size), size)
    return _rescaled(source, lambda: _keeping(cut), rescale)


def _magnitude_outliers(
    source: Pieces, generator: torch.Generator, own: Mapping[str, Any], rescale: bool
) -> Sparsified:
    """Drops the largest entries too; fewer of them where the density would not be reached."""
    size = _size(source)
    wanted = int(own["density"] * size)
    largest = min(int(own["gamma"] * size), size - wanted)
    if not wanted:
        return torch.zero_
    inner, outer = _cut(source, wanted + largest, size), _cut(source, largest, size)

    def make() -> Sparsified:
        keep, outliers = _keeping(inner), _keeping(outer)
        return lambda piece: keep(piece.clone()).sub_(outliers(piece)) if largest else keep(piece)

    return _rescaled(source, make, rescale)


def _random(
    source: Pieces, generator: torch.Generator, own: Mapping[str, Any], rescale: bool
) -> Sparsified:
    density = own["density"]
    if rescale:
        return lambda piece: drop_and_rescale(piece, density, generator)
    return lambda piece: drop_and_rescale(piece, density, generator).mul_(density)


def _by_rank(
    source: Pieces, generator: torch.Generator, own: Mapping[str, Any], rescale: bool
) -> Sparsified:
    """Keeps entry j with probability ``p_j``, which grows with its rank within its row."""
    density, epsilon = own["density"], own["epsilon"]

    def sparsified(piece: Tensor) -> Tensor:
        rows = piece.reshape(-1, piece.shape[-1])
        order = rows.abs().argsort(dim=1, stable=True)
        steps = torch.linspace(
            density - epsilon,
            density + epsilon,
            rows.shape[1],
            dtype=piece.dtype,
            device=piece.device,
        )
        if rows.shape[1] == 1:
            steps.fill_(density)
        chance = torch.empty_like(rows).scatter_(1, order, steps.expand_as(rows))
        drawn = torch.rand(rows.shape, generator=generator, device=generator.device)
        rows = rows * (drawn.to(chance) < chance)
        return (rows.div_(chance) if rescale else rows).reshape(piece.shape)

    return sparsified


def spread_problems(own: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with an `epsilon`: probabilities of keeping an entry are in (0, 1)."""
    density, epsilon = own["density"], own["epsilon"]
    if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
        yield Problem(
            "epsilon",
            f"{epsilon:g} with a density of {density:g}",
            f"less than {min(density, 1 - density):g}, which keeps density - epsilon and "
            "density + epsilon between 0 and 1",
            "Set a smaller `epsilon`.",
        )


MAGNITUDE = Sparsifier(_magnitude, (DENSITY,))
MAGNITUDE_OUTLIERS = Sparsifier(_magnitude_outliers, (DENSITY, GAMMA))
RANDOM = Sparsifier(_random, (DENSITY,))
BY_RANK = Sparsifier(_by_rank, (DENSITY, EPSILON), spread_problems)


def _size(source: Pieces) -> int:
    return sum(piece.numel() for piece in source())


def _cut(source: Pieces, keep: int, size: int) -> Cut:
    """Return where the `keep` largest magnitudes end; of equal ones the first are kept."""
    if not 0 < keep < size:
        return EVERYTHING
    return cut_for(lambda: (piece.reshape(-1) for piece in source()), keep, torch.float64)


def _keeping(cut: Cut) -> Sparsified:
    keeper = Keeper(cut)
    return lambda piece: keeper.drop(piece.reshape(-1)).reshape(piece.shape)


def _rescaled(source: Pieces, make: Callable[[], Sparsified], rescale: bool) -> Sparsified:
    """With `rescale`, what is kept is scaled to the sum of magnitudes that there was."""
    if not rescale:
        return make()
    before, after, sparsified = 0.0, 0.0, make()
    for piece in source():
        before += total(piece.abs())
        after += total(sparsified(piece).abs())
    if min(before, after) < RESCALE_FROM:
        return make()
    factor, again = before / after, make()
    return lambda piece: again(piece).mul_(factor)
