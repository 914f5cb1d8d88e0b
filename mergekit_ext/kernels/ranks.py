r"""Which ranks low-rank residuals get, so that their bytes leave the least squared error.

The residual of matrix j is cut to its :math:`r_j` leading singular triplets. That leaves the
squared error :math:`\sum_j w_j \sum_{k > r_j} \sigma_{jk}^2` (Eckart and Young 1936, "The
approximation of one matrix by another of lower rank"), and costs :math:`\sum_j c_j r_j` bytes. What
a triplet gains falls with k; so triplets are taken in the order of :math:`w_j \sigma_{jk}^2 / c_j`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
# Triplets are computed this far beyond a guess of the rank, and so many at least.
_MARGIN, _LEAST_DEPTH = 1.25, 8


def allocate(
    gains: Sequence[Tensor],
    costs: Sequence[int],
    *,
    budget: float = math.inf,
    goal: float = math.inf,
    multiple: int = 1,
    least: Sequence[int] = (),
) -> tuple[int, ...]:
    r"""Return the ranks that leave the least squared error.

    Steps of `multiple` triplets of one matrix are taken in the order of gain over cost (of equal
    ones that of the earlier matrix first) until the next one does not fit or the goal is reached;
    what is left of the budget is spent on the best steps that still fit. Steps without gain are
    not taken. The gain is the largest possible one where all steps cost the same, and elsewhere
    less than the gain of one step below it.

    Args:
        gains: for each matrix :math:`w_j \sigma_{jk}^2`, (K_j,), finite, not negative, descending
            in k, as far as its rank may go.
        costs: of one triplet of each matrix, positive.
        budget: the most that is spent.
        goal: a gain that is enough.
        multiple: of which ranks are, or K_j.
        least: ranks that are taken first, whatever they gain; the budget holds them.

    Raises:
        ValueError: gains that are not as described.
    """
    if any(least):
        above = (math.fsum(float(gain.sum()) for gain in gains) or 1.0) * max(costs) / min(costs)
        ahead = (torch.arange(len(g)) < n for g, n in zip(gains, least, strict=True))
        gains = [g.double() + above * held for g, held in zip(gains, ahead, strict=True)]
        goal += above * sum(least)
    each = [_steps(gain, multiple) for gain in gains]
    counts = np.array([len(gain) for gain, _ in each], dtype=np.int64)
    owner = np.repeat(np.arange(len(each)), counts)
    gain, width = (np.concatenate([*parts, np.zeros(0)]) for parts in zip(*each, strict=True))
    cost = width * np.asarray(costs, dtype=np.float64)[owner]
    density = gain / cost
    order = np.argsort(-density, kind="stable")
    spent, found = np.cumsum(cost[order]), np.cumsum(gain[order])
    enough = int(np.searchsorted(np.concatenate([[0.0], found]), goal))
    useful = int(np.count_nonzero(gain))
    fitting = min(int(np.searchsorted(spent, budget, side="right")), useful)
    taken = np.bincount(owner[order[: min(enough, fitting)]], minlength=len(each))
    first = np.cumsum(counts) - counts
    left = budget - (spent[fitting - 1] if fitting else 0.0)
    while fitting < min(enough, useful):
        offered = (first + taken)[taken < counts]
        fits = offered[(cost[offered] <= left) & (gain[offered] > 0)]
        if not len(fits):
            break
        best = fits[np.argmax(density[fits])]
        taken[owner[best]] += 1
        left -= cost[best]
    return tuple(int(width[owner == j][:count].sum()) for j, count in enumerate(taken))


def mean_rank(budget: float, costs: Sequence[int]) -> int:
    """Return the rank of all matrices that a budget pays for; 0 without one."""
    return 0 if budget == math.inf else int(budget // max(sum(costs), 1))


def deepened(
    most: Sequence[int],
    first: int,
    names: Sequence[str],
    decompose: Callable[[Sequence[int], Sequence[int]], None],
    chosen: Callable[[Sequence[int]], Sequence[int]],
    multiple: int = 1,
) -> Sequence[int]:
    """Return the ranks that `chosen` takes of matrices that are decomposed as deep as it needs.

    Of those whose names differ in numbers alone, and which have as many triplets, one is decomposed
    first. What `chosen` would take if the others were like it says how deep these are decomposed.

    Args:
        most: the largest rank of each matrix.
        first: a guess of all ranks.
        decompose: finds leading triplets of some of the matrices, given how many of each.
        chosen: returns the rank of each matrix, given those whose triplets count as its own.
        multiple: of which depths are; where a matrix gives all its triplets, its depth doubles.
    """

    def deep(rank: int) -> int:
        return -(-max(int(_MARGIN * rank), _LEAST_DEPTH) // multiple) * multiple

    kinds = [(re.sub("[0-9]+", "", name), top) for name, top in zip(names, most, strict=True)]
    alike = {kind: [k for k, own in enumerate(kinds) if own == kind] for kind in {*kinds}}
    like: Sequence[int] = [alike[kind][len(alike[kind]) // 2] for kind in kinds]
    wanted, depths = sorted({*like}), [min(top, deep(first)) for top in most]
    while True:
        decompose(wanted, depths)
        ranks = chosen(like)
        wanted = [k for k in sorted({*like}) if ranks[k] >= depths[k] < most[k]]
        for k in wanted:
            depths[k] = min(most[k], 2 * depths[k])
        if not wanted:
            known, like = {*like}, range(len(most))
            wanted = [k for k in like if k not in known]
            for k in wanted:
                depths[k] = min(most[k], deep(ranks[k]))
        if not wanted:
            return ranks


def _steps(gains: Tensor, multiple: int) -> tuple[Floats, Floats]:
    """Return gains and widths of the steps of one matrix."""
    values: Any = gains.detach().to("cpu").double().numpy()
    if not (np.isfinite(values).all() and (values >= 0).all() and (np.diff(values) <= 0).all()):
        raise ValueError("gains: expected finite values from 0.0, none above the one before")
    starts = np.arange(0, len(values), multiple)
    widths = np.minimum(multiple, len(values) - starts)
    return (np.add.reduceat(values, starts) if len(starts) else values), widths.astype(np.float64)
