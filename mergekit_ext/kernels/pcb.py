r"""PCB-Merging: balance how the task vectors compete for each parameter.

Du et al. 2024, "Parameter Competition Balancing for Model Merging".
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_ext.kernels.numerics import chunks
from mergekit_ext.kernels.selection import order_statistic

DEFAULT_DENSITY = 0.1
DEFAULT_CLIP = 1e-4


def pcb_merge(
    deltas: Sequence[Tensor], density: float = DEFAULT_DENSITY, clip: float = DEFAULT_CLIP
) -> Tensor:
    r"""Return the merged task vector :math:`\tau = \sum_i s_i \circ c_i \,/\, \sum_i s_i`.

    For each of the n task vectors :math:`\delta_i`, over all of its d entries:

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
      scores are all equal, q included, these entries get s_i = 1 and the others 0;
    * a zero task vector has s_i = 0: it still counts in n, but dilutes nothing. All zero: zeros.

    The n task vectors have one shape and dtype, float32 or float64, which the result has, and are
    finite. `density` is the share of entries kept, in (0, 1]; at least one, and an entry at q is
    not. `clip` is the share of magnitudes clipped at either end, in [0, 0.5). Computed in float64
    in cache-sized pieces; the sum is held in float64. The result depends on the scale of the task
    vectors, through tanh.
    """
    out = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    flat, flat_out = [delta.reshape(-1) for delta in deltas], out.view(-1)
    total = torch.zeros(out.numel(), dtype=torch.float64, device=out.device)
    for source in flat:
        total.add_(source)
    tasks = [_Competitor(source, total, len(flat), density, clip) for source in flat]
    for chunk in chunks(flat_out):
        top, bottom = torch.zeros_like(total[chunk]), torch.zeros_like(total[chunk])
        for task, source in zip(tasks, flat, strict=True):
            piece = source[chunk].to(torch.float64)
            share = task.share(piece, total[chunk])
            bottom.add_(share)
            top.addcmul_(share, task.clipped(piece))
        flat_out[chunk] = top.div_(bottom.masked_fill_(bottom == 0, 1.0))
    return out


class _Competitor:
    """One task vector: its quantiles, and the share that it gets of each entry."""

    def __init__(self, flat: Tensor, total: Tensor, models: int, density: float, clip: float):
        self._models, count = models, flat.numel()
        self._low = self._high = self._threshold = self._most = 0.0
        if count == 0:
            return

        def magnitudes() -> Iterator[Tensor]:
            return (flat[part].abs().double() for part in chunks(flat))

        def scores() -> Iterator[Tensor]:
            return (self._score(flat[part].double(), total[part]) for part in chunks(flat))

        self._low, self._high = _clip_range(magnitudes, clip, count)
        at = min(int(count * (1.0 - density)), count - 1)
        self._threshold = order_statistic(scores, at, count)
        self._most = max(float(piece.max()) for piece in scores())

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


def _clip_range(
    pieces: Callable[[], Iterator[Tensor]], clip: float, count: int
) -> tuple[float, float]:
    low = int(count * clip)
    high = max(int(count * (1.0 - clip) - 1.0), low)
    if low == 0 and high == count - 1:
        ends = [piece.aminmax() for piece in pieces()]
        return min(float(e.min) for e in ends), max(float(e.max) for e in ends)
    return order_statistic(pieces, low, count), order_statistic(pieces, high, count)
