"""TIES: trim task vectors, elect signs, average what agrees; in pieces, without a sort.

Yadav et al., "TIES-Merging", section 3. The parameters are those of mergekit's ``ties``, whose
results this reproduces in float32 (which of several equal magnitudes at the edge is trimmed is
arbitrary there; here the first are kept).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import total
from mergekit_ext.kernels.numerics import chunks, compute_dtype
from mergekit_ext.kernels.selection import EVERYTHING, Cut, Keeper, cut_for

# mergekit rescales only where both sums of magnitudes reach this.
_RESCALE_FROM = 1e-7


@dataclass(frozen=True)
class TiesOptions:
    """mergekit's shared parameters of ``ties`` and ``task_arithmetic``."""

    elect: bool = True  # a sign for each entry, of which what agrees is kept
    normalize: bool = True  # divide by the sum of the weights that were kept
    rescale: bool = False  # scale a trimmed task vector to the sum of magnitudes that it had
    factor: float = 1.0  # of the merged task vector


def merge_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float | Cut],
    options: TiesOptions,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return :math:`W_0 + \lambda \tau`.

    With :math:`d_i = w_i \, \mathrm{trim}(W_i - W_0)` and the elected sign
    :math:`\gamma = \mathrm{sgn}(\sum_i d_i)` (entry by entry, 1 for 0), tau is the sum of the
    :math:`d_i` whose sign is gamma, divided (`normalize`) by the sum of their weights.

    Args:
        base: any shape and floating dtype.
        tensors: the shape and device of `base`; finite.
        weights: one for each tensor.
        densities: for each tensor the share of entries that trimming keeps; at least one entry
            when positive, all from 1 on, none at 0 or below. Or a cut that was found elsewhere.
        options: see `TiesOptions`.
        out_dtype: dtype of the result; by default that of `base`.

    Arithmetic is float32 (float64 if an input is), cast once. Scratch: a few cache-sized chunks.
    """
    dtype = compute_dtype([base, *tensors])
    out = torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    flat_out, flat_base = out.view(-1), base.reshape(-1)
    sources = [
        _Source(tensor.reshape(-1), flat_base, dtype, density, options.rescale)
        for tensor, density in zip(tensors, densities, strict=True)
    ]
    for part in chunks(flat_base):
        pairs = zip(sources, weights, strict=True)
        deltas = [source.trimmed(part).mul_(weight) for source, weight in pairs]
        merged = _merged(deltas, weights, options)
        flat_out[part] = merged.mul_(options.factor).add_(flat_base[part].to(dtype))
    return out


def cut_of(delta: Tensor, density: float) -> Cut:
    """Return the cut that trims a flat float32 or float64 vector to a `density` above 0."""
    if density >= 1 or not delta.numel():
        return EVERYTHING
    return cut_for(lambda: (delta,), kept(density, delta.numel()), delta.dtype)


def kept(density: float, size: int) -> int:
    """Return how many of `size` entries a `density` between 0 and 1 keeps."""
    return max(1, int(density * size))


def made_up_for(pieces: Iterable[Tensor], drop: Callable[[Tensor], Tensor]) -> float:
    """Return the sum of magnitudes over that of what `drop` leaves of each piece, or 1."""
    before, after = 0.0, 0.0
    for piece in pieces:
        before += total(piece.abs().double())
        after += total(drop(piece).abs().double())
    return 1.0 if min(before, after) < _RESCALE_FROM else before / after


class _Source:
    """One task vector: its cut, found when it is made, and its trimmed chunks, in order."""

    def __init__(
        self, flat: Tensor, base: Tensor, dtype: torch.dtype, density: float | Cut, rescale: bool
    ):
        self._flat, self._base, self._dtype = flat, base, dtype
        self._zero = not isinstance(density, Cut) and density <= 0
        if isinstance(density, Cut):
            cut = density
        elif 0 < density < 1 and flat.numel():
            cut = cut_for(self._pieces, kept(density, flat.numel()), dtype)
        else:
            cut = EVERYTHING
        self._keeper, self._factor = Keeper(cut), 1.0
        if rescale and cut is not EVERYTHING:
            self._factor = made_up_for(self._pieces(), Keeper(cut).drop)

    def _delta(self, part: slice) -> Tensor:
        return self._flat[part].to(self._dtype) - self._base[part].to(self._dtype)

    def _pieces(self) -> Iterator[Tensor]:
        return (self._delta(part) for part in chunks(self._flat))

    def trimmed(self, part: slice) -> Tensor:
        """Return the trimmed task vector on `part`; parts must come in order."""
        if self._zero:
            return torch.zeros_like(self._flat[part], dtype=self._dtype)
        piece = self._keeper.drop(self._delta(part))
        return piece if self._factor == 1.0 else piece.mul_(self._factor)


def _merged(deltas: list[Tensor], weights: Sequence[float], options: TiesOptions) -> Tensor:
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    if not options.elect:
        divisor = sum(weights)
        # As in mergekit: weights that cancel leave the sum as it is.
        return total.div_(divisor) if options.normalize and abs(divisor) >= 1e-8 else total
    positive = total >= 0
    merged, divisor_of = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        merged.add_(delta.mul_(agrees))
        divisor_of.add_(agrees, alpha=weight)
    if options.normalize:
        merged.div_(divisor_of.masked_fill_(divisor_of == 0, 1.0))
    return merged
