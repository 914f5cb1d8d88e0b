"""One LoRE-Merging problem from its matrices to its result: differences, span, scale, solver.

Thresholding multiplies from the left by a function of ``X X^T``, so that with
``X_i = D_i + S`` and S a sum of such, every iterate is ``sum_j C_j D_j``: its rows never leave the
span of the rows of the differences D_i. The n differences from the mean sum to zero, so n - 1 of
them span it. For ``(n - 1) a < b`` one QR factorisation replaces the long side b by (n - 1) a,
an isometry that changes no singular value, norm or inner product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import matmul, qr, weighted_sum
from mergekit_ext.kernels.lore_outer import UPDATES, Limits, Outcome, Problem, Shrinker
from mergekit_ext.kernels.svt import Rule, Shrunk, power_of_two
from mergekit_ext.kernels.svt_matmul import MatmulShrinker
from mergekit_ext.kernels.svt_subspace import WarmShrinker

# The factorisation costs a few products; below this gain it is not worth it.
WORTHWHILE = 0.8
# Below this short side an eigendecomposition is cheap on any device.
MATMUL_LEAST = 512


def _on_cuda(shape: torch.Size) -> Shrinker:
    return MatmulShrinker() if min(shape) >= MATMUL_LEAST else WarmShrinker()


def _anywhere(shape: torch.Size) -> Shrinker:
    return WarmShrinker()


# How matrices of a shape are shrunk on a kind of device; "" for those not named.
STRATEGIES: dict[str, Callable[[torch.Size], Shrinker]] = {"": _anywhere, "cuda": _on_cuda}


@dataclass(frozen=True)
class Shrinkage:
    """How low the rank is to be: exactly one of the three is set."""

    mu: float | None = None
    mu_relative: float | None = None
    rank_ratio: float | None = None

    @classmethod
    def chosen(
        cls, mu: float | None, mu_relative: float | None, rank_ratio: float | None
    ) -> Shrinkage:
        """Checked; raises ValueError naming the parameter."""
        given = {"mu": mu, "mu_relative": mu_relative, "rank_ratio": rank_ratio}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise ValueError(
                f"mu, mu_relative, rank_ratio: found {named or 'none'}; expected exactly one"
            )
        for name, value in named.items():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: found {value!r}; expected a finite number >= 0")
        if rank_ratio is not None and rank_ratio > 1.0:
            raise ValueError(f"rank_ratio: found {rank_ratio!r}; expected a number from 0 to 1")
        return cls(mu, mu_relative, rank_ratio)

    def rule(self, spectral_norms: Sequence[float], scale: float, short_side: int) -> Rule:
        """The rule for matrices divided by `scale` with these largest singular values."""
        if self.rank_ratio is not None:
            # 0.2 * 15 is 3.0000000000000004 and means 3
            return Rule(rank=math.ceil(round(self.rank_ratio * short_side, 9)))
        if self.mu_relative is not None:
            return Rule(mu=self.mu_relative * max(spectral_norms))
        return Rule(mu=(self.mu or 0.0) / scale)


@dataclass(frozen=True)
class Span:
    """Coordinates of the differences in their common row space.

    Attributes:
        coordinates: one ``(a, r)`` matrix per model (``r <= b``).
        frame: ``(b, r)`` with orthonormal columns, or None for the identity.
    """

    coordinates: list[Tensor]
    frame: Tensor | None

    @classmethod
    def of(cls, differences: Sequence[Tensor]) -> Span:
        """`differences` from their mean, each ``(a, b)`` with ``a <= b``."""
        rows, columns = differences[0].shape
        independent = len(differences) - 1
        if independent == 0 or independent * rows > WORTHWHILE * columns:
            return cls(list(differences), None)
        frame, corner = qr(torch.cat(list(differences[:-1])).T)
        blocks = [block.T.contiguous() for block in corner.split(rows, dim=1)]
        blocks.append(-torch.stack(blocks).sum(0))
        return cls(blocks, frame)

    def expand(self, coordinates: Tensor) -> Tensor:
        """Back to ``(a, b)``."""
        return coordinates if self.frame is None else matmul(coordinates, self.frame.T)


@dataclass(frozen=True)
class Combine:
    """``tau = function(deltas, weights)``; a linear one may be applied in any coordinates."""

    function: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    linear: bool


def weighted_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``tau = sum_i w_i delta_i / sum_i w_i``; the weights must not sum to zero."""
    return weighted_sum(deltas, weights).div_(math.fsum(weights))


def elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Optional 2, TIES without trimming (Yadav et al. 2023), entry by entry.

    The sign of ``sum_i w_i delta_i`` is elected; tau is the weighted mean of the delta_i that have
    it. An entry with no sign, or whose agreeing weights sum to zero, is zero. (The paper writes
    the mean of tau over the agreeing models; the mean of their delta_i is meant.)
    """
    elected = weighted_sum(deltas, weights).sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() == elected).to(delta.dtype)
        total.add_(delta * agrees, alpha=weight)
        mass.add_(agrees, alpha=weight)
    empty = mass == 0
    return torch.where(empty, torch.zeros_like(total), total / mass.masked_fill(empty, 1.0))


# Ways to make one task vector tau of the low-rank delta_i (Algorithm 1, step 2).
COMBINE: dict[str, Combine] = {
    "sum": Combine(weighted_sum, linear=True),
    "mean": Combine(weighted_mean, linear=True),
    "ties": Combine(elected_mean, linear=False),
}


@dataclass(frozen=True)
class Fit:
    """A solved problem. `base` has the orientation of the inputs; the rest is in coordinates."""

    base: Tensor
    outcome: Outcome
    span: Span
    transposed: bool
    scale: float
    spectral_norms: tuple[float, ...]
    mu: float | None

    @property
    def objective(self) -> float:
        return self.outcome.objective * self.scale**2

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(p.rank for p in self.outcome.parts)

    def task_vector(self, combine: Combine, weights: Sequence[float]) -> Tensor:
        """tau, in the orientation of the inputs."""
        deltas = [p.value for p in self.outcome.parts]
        if combine.linear:
            tau = self.span.expand(combine.function(deltas, weights))
        else:
            tau = combine.function([self.span.expand(d) for d in deltas], weights)
        return _oriented(tau, self.transposed).mul(self.scale)


def fit(
    models: Sequence[Tensor],
    base: Tensor | None,
    shrinkage: Shrinkage,
    update: str,
    limits: Limits,
) -> Fit:
    """Solve for theta_0 (unless `base` is given) and the delta_i of non-empty matrices."""
    transposed = models[0].shape[0] > models[0].shape[1]
    centre, differences = _centred(models, base)
    # squares of tiny or huge entries stay in range; a power of two changes no digit
    scale = max(power_of_two(d) if d.any() else 0.0 for d in differences) or 1.0
    differences = [_oriented(d, transposed).div(scale) for d in differences]
    span = Span.of(differences) if base is None else Span(differences, None)
    del differences

    make = STRATEGIES.get(models[0].device.type, STRATEGIES[""])
    shrinkers = [make(models[0].shape) for _ in models]
    norms = [s.start(d) for s, d in zip(shrinkers, span.coordinates, strict=True)]
    rule = shrinkage.rule(norms, scale, min(models[0].shape))
    parts = [s.first(d, rule) for s, d in zip(shrinkers, span.coordinates, strict=True)]
    problem = Problem(span.coordinates, shrinkers, rule)
    if base is None:
        outcome = UPDATES[update](problem, parts, limits)
        shift = _oriented(span.expand(outcome.mean), transposed).mul(scale)
        centre = centre - shift
    else:
        outcome = _fixed(problem, parts, limits)
    return Fit(
        base=centre,
        outcome=outcome,
        span=span,
        transposed=transposed,
        scale=scale,
        spectral_norms=tuple(v * scale for v in norms),
        mu=None
        if rule.mu is None
        else (shrinkage.mu if shrinkage.mu is not None else rule.mu * scale),
    )


def _fixed(problem: Problem, parts: list[Shrunk], limits: Limits) -> Outcome:
    """theta_0 is given: each delta_i is one shrinking."""
    zero = torch.zeros_like(parts[0].value)
    objective = problem.objective(zero, parts)
    limits.report(1, objective, 0.0)
    return Outcome(parts, zero, 1, 0.0, objective, True)


def _centred(models: Sequence[Tensor], base: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The starting theta_0 and the differences from it.

    The mean is taken of differences from the first model: exact for identical models, and
    accurate when the models differ little. With two models the differences are exactly opposite.
    """
    if base is not None:
        return base, [m - base for m in models]
    apart = [m - models[0] for m in models]
    shift = torch.zeros_like(apart[0])
    for difference in apart[1:]:
        shift.add_(difference)
    shift.div_(len(models))
    return models[0] + shift, [d.sub_(shift) for d in apart]


def _oriented(matrix: Tensor, transposed: bool) -> Tensor:
    return matrix.T.contiguous() if transposed else matrix
