r"""PCB-Merging: balance how the task vectors compete for each parameter.

Du et al. 2024, "Parameter Competition Balancing for Model Merging".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks
from mergekit_ext.kernels.selection import order_statistic

DEFAULT_DENSITY = 0.1
DEFAULT_CLIP = 1e-4

Part = tuple[Tensor, Tensor]  # of a task vector and of the sum of all, both flat


def pcb_merge(
    deltas: Sequence[Sequence[Tensor]],
    density: float = DEFAULT_DENSITY,
    clip: float = DEFAULT_CLIP,
) -> list[Tensor]:
    r"""The merged task vector :math:`\tau = \sum_i s_i \circ c_i \,/\, \sum_i s_i`.

    For each of the n task vectors :math:`\delta_i`, over all of its entries:

    * :math:`c_i = \mathrm{sgn}(\delta_i)\,|\delta_i|`, the ``floor(clip * d)`` least of the d
      magnitudes raised to the next one, the ``ceil(clip * d)`` largest lowered: always the largest
      one, unless `clip` is 0;
    * intra-balancing :math:`a_i = \exp(n\,\mathrm{norm}(|c_i|)^2)`;
    * inter-balancing :math:`b_i = \tanh(\delta_i \circ \sum_j \delta_j)`;
    * :math:`s_i = \mathrm{norm}(\max(a_i \circ b_i,\ q))`, q the quantile 1 - `density` of
      :math:`a_i \circ b_i`.

    norm maps the least value to 0 and the largest to 1. An entry that no task keeps
    (:math:`\sum_i s_i = 0`) is 0.

    This is what the authors' code (github.com/duguodong7/pcb-merging) computes. The paper has a
    softmax over the entries in both balancings, of :math:`n\,\mathrm{norm}(\delta_i^2)` and, summed
    over j, of :math:`\mathrm{norm}(\delta_i \circ \delta_j)`, does not clip, and divides what
    remains by its maximum without taking q from it. Departures from the code:

    * it divides by ``max(sum_i s_i, 1e-12)``; here by the sum;
    * its norm of a constant is NaN. Here constant magnitudes are 0 in a_i, and where the largest
      scores are all equal, q included, these entries get s_i = 1 and the others 0. So a constant
      task vector weighs 1 everywhere, and so does one with a single entry;
    * a zero task vector has s_i = 0: it still counts in n, but dilutes nothing. All zero: zeros.

    The result depends on the scale of the task vectors, through tanh. Identical task vectors
    return their clipped selves where they are kept.

    Args:
        deltas: n task vectors, each a sequence of parts; the parts of all have the same shapes
            and one dtype, float32 or float64. Finite.
        density: share of entries kept, in (0, 1]; at least one, and an entry at q is not.
        clip: share of magnitudes clipped at either end, in [0, 0.5).

    Returns:
        one tensor for each part, in its dtype. Computed in float64, in cache-sized pieces; beyond
        the inputs and the result, one block of float64 (the sum) is held. Each input is read four
        times, mostly, and up to about ten times.

    Raises:
        ValueError: `density` or `clip` is out of range.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density: found {density!r}; expected a number above 0, at most 1")
    if not 0.0 <= clip < 0.5:
        raise ValueError(f"clip: found {clip!r}; expected a number from 0 to below 0.5")
    totals = [_sum(parts) for parts in zip(*deltas, strict=True)]
    tasks = [_Competitor(delta, totals, len(deltas), density, clip) for delta in deltas]
    merged = []
    for index, parts in enumerate(zip(*deltas, strict=True)):
        out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        flat, flat_out, total = [p.reshape(-1) for p in parts], out.view(-1), totals[index]
        for chunk in chunks(flat_out):
            pieces = [source[chunk].to(torch.float64) for source in flat]
            flat_out[chunk] = _balanced(tasks, pieces, total[chunk])
        merged.append(out)
    return merged


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(parts[0].numel(), dtype=torch.float64, device=parts[0].device)
    for part in parts:
        total.add_(part.reshape(-1))
    return total


def _balanced(tasks: Sequence[_Competitor], pieces: Sequence[Tensor], total: Tensor) -> Tensor:
    top, bottom = torch.zeros_like(total), torch.zeros_like(total)
    for task, piece in zip(tasks, pieces, strict=True):
        share = task.share(piece, total)
        bottom.add_(share)
        top.addcmul_(share, task.clipped(piece))
    return top.div_(bottom.masked_fill_(bottom == 0, 1.0))


class _Competitor:
    """One task vector: its quantiles, and the share that it gets of each entry."""

    def __init__(
        self,
        delta: Sequence[Tensor],
        totals: Sequence[Tensor],
        models: int,
        density: float,
        clip: float,
    ):
        self._models = models
        flat = [part.reshape(-1) for part in delta]
        pairs: list[Part] = list(zip(flat, totals, strict=True))
        count = sum(part.numel() for part in flat)
        self._low = self._high = self._threshold = self._most = 0.0
        if count == 0:
            return
        self._low, self._high = _clip_range(lambda: _magnitudes(pairs), clip, count)
        at = min(int(count * (1.0 - density)), count - 1)
        self._threshold = order_statistic(lambda: self._scores(pairs), at, count)
        self._most = max(float(piece.max()) for piece in self._scores(pairs))

    def clipped(self, piece: Tensor) -> Tensor:
        return piece.abs().clamp_(self._low, self._high).copysign_(piece).mul_(piece != 0)

    def share(self, piece: Tensor, total: Tensor) -> Tensor:
        if self._high == 0.0:
            return torch.zeros_like(piece)
        score = self._score(piece, total)
        width = self._most - self._threshold
        if width == 0.0:
            return (score >= self._most).to(piece.dtype)
        return score.sub_(self._threshold).clamp_(min=0.0).div_(width)

    def _score(self, piece: Tensor, total: Tensor) -> Tensor:
        rivalry = torch.tanh(piece * total)
        width = self._high - self._low
        if width == 0.0:
            return rivalry
        own = piece.abs().clamp_(self._low, self._high).sub_(self._low).div_(width)
        return own.square_().mul_(self._models).exp_().mul_(rivalry)

    def _scores(self, pairs: Sequence[Part]) -> Iterator[Tensor]:
        for flat, total in pairs:
            for chunk in chunks(flat):
                yield self._score(flat[chunk].to(torch.float64), total[chunk])


def _magnitudes(pairs: Sequence[Part]) -> Iterator[Tensor]:
    for flat, _ in pairs:
        for chunk in chunks(flat):
            yield flat[chunk].abs().to(torch.float64)


def _clip_range(
    pieces: Callable[[], Iterator[Tensor]], clip: float, count: int
) -> tuple[float, float]:
    low = int(count * clip)
    high = max(int(count * (1.0 - clip) - 1.0), low)
    if low == 0 and high == count - 1:
        ends = [piece.aminmax() for piece in pieces()]
        return min(float(e.min) for e in ends), max(float(e.max) for e in ends)
    return order_statistic(pieces, low, count), order_statistic(pieces, high, count)
