"""What LoRE is solved for, the differences of models from a start, and its result by row blocks.

Thresholding multiplies wide matrices from the left by functions of ``X X^T``: iterates are ``A D``,
with D the stacked differences from the mean (all but one: they sum to zero), or each model's from a
base. With ``D D^T + s I = L L^T`` rows of L stand for those of D: singular values, norms and inner
products of ``A L`` are those of ``A [D, sqrt(s) I]``. So the long side of a matrix counts in two
passes only: one that sums up ``D D^T`` in float64, and one that writes the result.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import (
    cholesky,
    gram,
    matmul,
    norm,
    power_of_two,
    solve_triangular,
)
from mergekit_ext.kernels.numerics import weighted_sum

# Entries of all models that are read at once, and for large sums the least rows.
BLOCK, ROWS = 1 << 20, 256
# The sums cost a few products; below this gain they are not worth it.
WORTHWHILE = 0.8
# s over the trace of ``D D^T``, in eps of float64: what rounding may take from an eigenvalue. Where
# a factorisation fails, so many times more, and so often. Singular values above mu are off by
# ``s / (2 mu)``, which float32 does not see, at most.
SHIFT, MORE, TRIES = 8.0, 16.0, 6


class Span:
    """The differences of models, wide and scaled; of long float32 matrices rows of L for them.

    Attributes:
        scale: a power of two that keeps squares of tiny or huge entries in range.
        length: the norm of the start: of the given base, or the mean of the models.
        differences: one matrix per model, ``(a, r)`` with ``a <= r``. `merged` drops them.
    """

    def __init__(self, models: Sequence[Tensor], base: Tensor | None, dtype: torch.dtype):
        self._wide = models[0].shape[0] <= models[0].shape[1]
        self._models = [self._tall(model) for model in models]
        self._base, self._dtype = None if base is None else self._tall(base), dtype
        rows, columns = self._models[0].shape
        side = columns if base is not None else columns * (len(models) - 1)
        summed = dtype == torch.float32 and 0 < side <= WORTHWHILE * rows
        size, kind = ((side, side), torch.float64) if summed else ((columns, rows), dtype)
        count = 1 if summed and base is None else len(models)
        matrices = [models[0].new_zeros(size, dtype=kind) for _ in range(count)]
        peaks, lengths = [0.0], [0.0]
        for part, start, apart in self._blocks():
            lengths.append(norm(start))
            peaks += [power_of_two(difference) for difference in apart if difference.any()]
            pieces = self._stacked(apart) if summed else apart
            for matrix, piece in zip(matrices, pieces, strict=True):
                if summed:
                    gram(piece.double().T, onto=matrix)
                else:
                    matrix[:, part] = piece.T
        self.length, self.scale = math.hypot(*lengths), max(peaks) or 1.0
        self._factors: list[Tensor] = []
        if not summed:
            self.differences = [matrix.div_(self.scale) for matrix in matrices]
            return
        while matrices:
            self._factors.append(_factor(matrices.pop(0).div_(self.scale**2)))
        blocks = [block for factor in self._factors for block in factor.split(columns)]
        self.differences = [block.to(dtype).contiguous() for block in blocks]
        if base is None:
            self.differences.append(weighted_sum(self.differences, [-1.0] * len(blocks)))

    def merged(
        self, deltas: Sequence[Tensor], weights: Sequence[float], lam: float, combine: str
    ) -> tuple[Tensor, Tensor]:
        """Return theta* and theta_0 of the models' shape from the delta_i (Algorithm 1, step 2)."""
        self.differences = []
        divisor = math.fsum(weights) if combine == "mean" else 1.0
        even = len(set(weights)) == 1  # then tau is a multiple of the mean

        def means(parts: Sequence[Tensor]) -> list[Tensor]:
            """Return the mean and tau."""
            mean = weighted_sum(parts, [1.0 / len(parts)] * len(parts))
            if combine == "ties":
                return [mean, _elected_mean(parts, weights)]
            shares = [weight / divisor for weight in weights]
            return [mean] if even else [mean, weighted_sum(parts, shares)]

        shared = self._base is None and combine != "ties"
        coordinates = means(deltas) if shared else deltas
        if summed := bool(self._factors):
            pairs = zip(coordinates, cycle(self._factors))
            coordinates = [_coefficients(matrix, factor) for matrix, factor in pairs]
            self._factors = []
        like, shape = self._models[0], self._tall(self._models[0]).shape
        merged = like.new_empty(shape, dtype=self._dtype)
        base = torch.empty_like(merged) if self._base is None else self._tall(self._base)
        for part, start, apart in self._blocks():
            if summed:
                pairs = zip(coordinates, cycle(self._stacked(apart)))
                parts = [matmul(differences, left.T) for left, differences in pairs]
            else:
                parts = [matrix[:, part].T.mul(self.scale) for matrix in coordinates]
            mean, *tau = parts if shared else means(parts)
            if self._base is None:
                self._tall(base)[part] = start.sub_(mean)
            vector = tau[0] if tau else mean.mul_(len(weights) * weights[0] / divisor)
            self._tall(merged)[part] = start + lam * vector
        return merged, base

    def _blocks(self) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
        """Yield some rows at a time: which, the start, and the differences from it."""
        rows, columns = self._models[0].shape
        step = max(ROWS, BLOCK // (len(self._models) * columns))
        for at in range(0, rows, step):
            part = slice(at, at + step)
            models = [model[part].to(self._dtype) for model in self._models]
            if self._base is None:
                yield part, *_centred(models)
            else:
                start = self._base[part].to(self._dtype)
                yield part, start, [model - start for model in models]

    def _stacked(self, apart: list[Tensor]) -> list[Tensor]:
        """Return what spans each of the spaces in which is solved."""
        return apart if self._base is not None else [torch.cat(apart[:-1], dim=1)]

    def _tall(self, matrix: Tensor) -> Tensor:
        return matrix.T if self._wide else matrix


def _factor(total: Tensor) -> Tensor:
    """Return L with ``L L^T = total + s I``, of a lower triangle that is changed; see `SHIFT`."""
    eps, tiny = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
    shift = SHIFT * eps * float(total.trace()) or tiny  # L of zeros is 0 in float32
    for _ in range(TRIES):
        total.diagonal().add_(shift)
        factor, failed = cholesky(total)
        if int(failed) == 0:
            return factor
        shift *= MORE
    raise torch.linalg.LinAlgError("the differences of the models are not finite")


def _coefficients(coordinates: Tensor, factor: Tensor) -> Tensor:
    """Return A of ``A L``."""
    wide = coordinates.to(factor.dtype)
    return solve_triangular(factor, wide, upper=False, left=False).to(coordinates.dtype)


def _centred(models: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the mean and the differences from it, of two models exactly opposite.

    The mean is taken of differences from the first model: exact for identical models.
    """
    apart = [m - models[0] for m in models]
    shift = torch.zeros_like(apart[0])
    for difference in apart[1:]:
        shift.add_(difference)
    shift.div_(len(models))
    return models[0] + shift, [d.sub_(shift) for d in apart]


def _elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return optional 2, TIES without trimming (Yadav et al. 2023), entry by entry.

    The sign of ``sum_i w_i delta_i`` is elected; tau is the weighted mean of the delta_i that have
    it (not of tau, as the paper writes), 0 where there is none.
    """
    elected = weighted_sum(deltas, weights).sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() == elected).to(delta.dtype)
        total.add_(delta * agrees, alpha=weight)
        mass.add_(agrees, alpha=weight)
    empty = mass == 0
    return torch.where(empty, torch.zeros_like(total), total / mass.masked_fill(empty, 1.0))
