"""The iterations of LoRE-Merging for one matrix of each model.

With D_i = theta_i - mean and theta_0 = mean - S, the simultaneous update of Algorithm 1 is the
fixed-point iteration ``S <- mean_i shrink(D_i + S)``. For thresholding it is gradient descent on a
smooth convex function of S, the sum over i of what is left when delta_i is minimised out. Steps in
the proximal maps of its terms, one after the other, go to the same minimiser in fewer evaluations,
and each costs one thresholding as well (`accelerated`). Rank truncation is not convex and the
sequential update need not have one limit: these are iterated as the paper has them.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import matmul, norm
from mergekit_ext.kernels.numerics import weighted_sum
from mergekit_ext.kernels.svt import MatmulShrinker, Rule, Shrunk
from mergekit_ext.kernels.svt_subspace import WarmShrinker

# One model's shrinking operator, which may keep what it learned from call to call. `start` and
# `first` see the first matrix; `shrink` may be rough by `noise` times the norm of its argument,
# `settle` may not.
Shrinker = WarmShrinker | MatmulShrinker
# Below this short side an eigendecomposition is cheap on any device.
MATMUL_LEAST = 512
# The last step of a settled subspace may move a delta_i by this share of the tolerance.
SETTLED_SHARE = 0.5
# Units of rounding of the largest ||D_i|| below which a change of S is none. Measured: thresholding
# one matrix twice, from two bases of the same subspace, differs by about 10.
FLOOR = 8.0
# A proximal step is this over the curvature that `_curvature` expects. Chosen by trial.
STEP = 2.0
# Iterates that are combined with the last, and rows and columns of them that decide how.
MEMORY, SAMPLED = 3, (128, 1024)
# What is left may be twice the sum of changes that go on to shrink as in the last sweeps, and more
# where that is slow: bench/README.md has how often it was. Changes that shrink by less in a sweep
# say nothing; those that rounding can cause count as none where they shrank steadily before, and
# are where the iteration ends otherwise.
SAFETY, CAUTION, SWEEPS, SLOWEST, STEADY = 2.0, 1.5, 4, 0.97, 0.8


def shrinker_for(device: str, shape: torch.Size) -> Shrinker:
    """Return how matrices of a shape are shrunk on a kind of device."""
    by_products = device == "cuda" and min(shape) >= MATMUL_LEAST
    return MatmulShrinker() if by_products else WarmShrinker()


@dataclass(frozen=True)
class Limits:
    """When to stop, and what is called: ``on_iteration(iteration, objective, change)``.

    The error of S may be `tolerance` of its norm, or `error` if that is more: less of it where S is
    shorter than `length`, in proportion. In any case it may be `reach` times what rounding causes;
    if that is more than 1, an iteration that rounding alone moves has converged.
    """

    max_iterations: int
    tolerance: float
    error: float = 0.0
    length: float = 0.0
    reach: float = 1.0
    on_iteration: Callable[[int, float, float], None] | None = None

    def enough(self, size: float) -> float:
        share = min(1.0, size / self.length) if self.length else 1.0
        return max(self.tolerance * size, self.error * share)

    def report(self, count: int, objective: float, change: float) -> None:
        if self.on_iteration is not None:
            self.on_iteration(count, objective, change)


@dataclass(frozen=True)
class Point:
    """All delta_i thresholded at one S, then theta_0 solved for them (S becomes `mean`)."""

    parts: list[Shrunk]
    mean: Tensor
    gradient: Tensor
    objective: float


@dataclass(frozen=True)
class Outcome:
    """The delta_i that a solver found, in the coordinates that it was given."""

    parts: list[Shrunk]
    objective: float
    iterations: int
    change: float
    converged: bool


@dataclass(frozen=True)
class Problem:
    """``sum_i 1/2||D_i + S - delta_i||_F^2 + mu ||delta_i||_*`` over S and the delta_i."""

    differences: list[Tensor]
    shrinkers: list[Shrinker]
    rule: Rule

    @property
    def size(self) -> float:
        return max(norm(d) for d in self.differences)

    @property
    def floor(self) -> float:
        """A change of S that rounding alone can cause."""
        return FLOOR * torch.finfo(self.differences[0].dtype).eps * self.size

    def point(self, at: Tensor, parts: list[Shrunk]) -> Point:
        mean = parts[0].value.clone()
        for part in parts[1:]:
            mean.add_(part.value)
        mean.div_(len(parts))
        gradient = at - mean
        # at S = mean the quadratic terms are lower by exactly n/2 ||S - mean||^2
        objective = self.objective(at, parts) - 0.5 * len(parts) * norm(gradient) ** 2
        return Point(parts, mean, gradient, objective)

    def objective(self, at: Tensor, parts: list[Shrunk]) -> float:
        terms = [0.0]
        for difference, part in zip(self.differences, parts, strict=True):
            terms.append(0.5 * norm((difference + at).sub_(part.value)) ** 2)
            terms.append((self.rule.mu or 0.0) * part.nuclear)
        return math.fsum(terms)

    def evaluate(self, at: Tensor) -> Point:
        pairs = zip(self.shrinkers, self.differences, strict=True)
        return self.point(at, [s.shrink(d + at) for s, d in pairs])


def simultaneous(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """Algorithm 1. `start` holds the shrunk D_i, its first iteration."""
    descend = accelerated if problem.rule.mu is not None and len(start) > 2 else plain
    return descend(problem, start, limits)


def accelerated(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """Proximal steps for one model after the other, with Anderson acceleration; empties `start`.

    Once the next sweep should be good enough, sweeps are settled: nothing is missed in the result.
    """
    first = problem.point(torch.zeros_like(start[0].value), start)
    parts, mean, count = start, first.mean, 1
    change = 1.0 if norm(mean) else 0.0
    limits.report(count, first.objective, change)
    if not change:
        return Outcome(parts, first.objective, count, change, True)
    saga = _PointSaga(problem, first)
    del first
    floor, largest = (saga.growth * size for size in (problem.floor, problem.size))
    anderson, remaining = _Anderson(mean.shape), _Remaining(norm(mean), floor)
    settled = converged = stalled = False
    while not (converged or (stalled and limits.reach == 1.0)) and count < limits.max_iterations:
        enough = max(limits.enough(norm(mean)), limits.reach * floor)
        before, last = anderson.sample(saga.state), mean
        parts.clear()  # a sweep does not need them, but memory
        parts = saga.sweep(SETTLED_SHARE * enough if settled else None)
        mean = _mean([part.value for part in parts])
        count, change = count + 1, _relative(norm(mean - last), norm(mean))
        limits.report(count, problem.objective(mean, parts), change)
        saga.state, residual = anderson(before, saga.state)
        left, rate = remaining(norm(saga.state[0] - mean), residual)
        noise = max(shrinker.noise for shrinker in problem.shrinkers) * largest
        stalled = remaining.stalled
        reached = left <= enough or (stalled and limits.reach > 1.0)
        converged = settled and reached
        settled = settled or reached or left * rate <= max(enough, noise)
    return Outcome(parts, problem.objective(mean, parts), count, change, converged)


class _PointSaga:
    """Point-SAGA (Defazio 2016, "A simple practical accelerated method for finite sums").

    The models are taken in a fixed order. With t the step, f_i the term of model i and h_i its
    gradient times t where it was taken last, h their mean,

        z = S + h_i - h,   W = D_i + z,   delta_i = SVT(W; (1 + t) mu),
        S = prox_(t f_i)(z) = (W + t delta_i) / (1 + t) - D_i,   h_i = z - S.

    At the fixed point h = 0 and delta_i = SVT(D_i + S; mu).

    Attributes:
        state: S and the h_i.
        growth: at most by how much W is larger than D_i, and with it rounding.
    """

    def __init__(self, problem: Problem, first: Point):
        self._differences, self._shrinkers = problem.differences, problem.shrinkers
        self._step = STEP / _curvature([part.rank for part in first.parts], first.mean.shape)
        for shrinker in self._shrinkers:
            shrinker.follow(1.0 + self._step)
        pairs = zip(self._differences, first.parts, strict=True)
        gradients = [(difference - part.value).mul_(self._step) for difference, part in pairs]
        self.state = [first.mean, *gradients]
        self.growth = 1.0 + max(norm(gradient) for gradient in gradients) / problem.size

    def sweep(self, accuracy: float | None) -> list[Shrunk]:
        """Take a step for each model; return its delta_i, settled if an accuracy is given."""
        at, *gradients = self.state
        self.state = []
        mean, share = _mean(gradients), 1.0 / (1.0 + self._step)
        parts = []
        pairs = zip(self._differences, self._shrinkers, strict=True)
        for i, (difference, shrinker) in enumerate(pairs):
            point = (at + gradients[i]).sub_(mean)
            moved = difference + point
            part = shrinker.shrink(moved) if accuracy is None else shrinker.settle(moved, accuracy)
            parts.append(part)
            at = (part.value - difference).lerp_(point, share)
            mean.sub_(gradients[i], alpha=1.0 / len(gradients))
            gradients[i] = point.sub_(at)
            mean.add_(gradients[i], alpha=1.0 / len(gradients))
        self.state = [at, *gradients]
        return parts


def _curvature(ranks: Sequence[int], shape: torch.Size) -> float:
    """Return the least curvature of the sum of the terms that is to be expected.

    A term is flat along matrices that are symmetric in the singular vectors above mu, ``r^2/2`` of
    ``a b`` directions. n projections onto random subspaces with a share q of all directions each
    add up to eigenvalues from ``(n - 2) q + 1 - 2 sqrt((n - 1) q (1 - q))`` on (Kesten 1959).
    """
    count = len(ranks)
    curved = 1.0 - sum(rank**2 for rank in ranks) / (2.0 * count * math.prod(shape))
    return (count - 2) * curved + 1.0 - 2.0 * math.sqrt((count - 1) * curved * (1.0 - curved))


class _Anderson:
    """Anderson acceleration, type II (Walker and Ni 2011), of ``x <- g(x)``, x several matrices."""

    def __init__(self, shape: torch.Size):
        steps = (-(-side // most) for side, most in zip(shape, SAMPLED, strict=True))
        self._some = tuple(slice(None, None, step) for step in steps)
        self._seen: deque[tuple[list[Tensor], Tensor]] = deque(maxlen=MEMORY + 1)

    def __call__(self, before: Tensor, after: list[Tensor]) -> tuple[list[Tensor], float]:
        """Return the next x from a sample of x and g(x), and the norm of ``g(x) - x``, sampled."""
        residual = self.sample(after) - before
        self._seen.append((after, residual))
        turns = torch.stack([kept for _, kept in self._seen]).diff(dim=0)
        system = matmul(turns, turns.T)
        system.diagonal().add_(1e-10 * float(system.trace()) + torch.finfo(torch.float64).tiny)
        shares = torch.linalg.solve(system, matmul(turns, residual[:, None]))[:, 0]
        # x = g_m - sum_j c_j (g_(j+1) - g_j)
        end = shares.new_ones(1)
        weights = torch.cat([shares, end]).sub_(torch.cat([0.0 * end, shares])).tolist()
        states = zip(*(state for state, _ in self._seen), strict=True)
        return [weighted_sum(matrices, weights) for matrices in states], norm(residual)

    def sample(self, state: Sequence[Tensor]) -> Tensor:
        """Return what decides how iterates are combined."""
        return torch.stack([matrix[self._some] for matrix in state]).double().flatten()


class _Remaining:
    """Estimates the error of S that is left, from changes that shrink by a rate in each sweep.

    A change is what Anderson acceleration adds to S; the first is S itself. One below `floor` may
    be rounding, which does not shrink.
    """

    def __init__(self, first: float, floor: float):
        self._changes = deque([first], maxlen=SWEEPS + 1)
        self._residuals: deque[float] = deque(maxlen=SWEEPS + 1)
        self._floor, self._rate = floor, 1.0

    @property
    def stalled(self) -> bool:
        """Whether rounding may have been all that there was for some sweeps."""
        return max(self._changes) <= 2.0 * self._floor

    def __call__(self, change: float, residual: float) -> tuple[float, float]:
        """Return the error, infinity where nothing can be said, and the rate."""
        self._changes.append(change)
        self._residuals.append(residual)
        rate = max(_rate(self._changes), _rate(self._residuals))
        none = change <= self._floor
        self._rate = rate = min(rate, self._rate) if none else rate
        if none and rate <= STEADY:
            return 0.0, rate
        trusted = len(self._residuals) > 1 and rate <= SLOWEST
        return SAFETY * change / (1.0 - rate) ** CAUTION if trusted else math.inf, rate


def _rate(values: Sequence[float]) -> float:
    """Return by which factor values fall at each step: of all or the last one."""
    if len(values) < 2 or not values[-2] or not values[0]:
        return 0.0
    return max((values[-1] / values[0]) ** (1.0 / (len(values) - 1)), values[-1] / values[-2])


def _mean(matrices: Sequence[Tensor]) -> Tensor:
    return weighted_sum(matrices, [1.0 / len(matrices)] * len(matrices))


def plain(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """Algorithm 1 as written: theta_0, then every delta_i from it."""
    now = problem.point(torch.zeros_like(start[0].value), start)
    stop = _Stop(limits, problem.floor)
    count, done = 1, stop(1, now.objective, norm(now.gradient), norm(now.mean))
    while not done and count < limits.max_iterations:
        now = problem.evaluate(now.mean)
        count += 1
        done = stop(count, now.objective, norm(now.gradient), norm(now.mean))
    return Outcome(now.parts, now.objective, count, stop.change, done)


def sequential(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """Gauss-Seidel: theta_0 is solved again after each delta_i. An iteration is one sweep.

    Never extrapolated: with two models the minimiser is not unique, and the order chooses it.
    """
    count = len(problem.differences)
    parts: list[Shrunk] = []
    mean = torch.zeros_like(start[0].value)
    stop, done, sweep = _Stop(limits, problem.floor), False, 0
    while not done and sweep < limits.max_iterations:
        before = mean.clone()
        accuracy = SETTLED_SHARE * max(limits.enough(norm(mean)), problem.floor)
        for i, difference in enumerate(problem.differences):
            if sweep == 0 and i == 0:
                part = start[0]
            else:
                part = problem.shrinkers[i].settle(difference + mean, accuracy)
            change = part.value - parts[i].value if sweep else part.value
            parts[i : i + 1] = [part]
            mean.add_(change, alpha=1.0 / count)
        sweep += 1
        objective = problem.objective(mean, parts)
        done = stop(sweep, objective, norm(mean - before), norm(mean))
    exact = torch.stack([p.value for p in parts]).mean(0)
    return Outcome(parts, problem.objective(exact, parts), sweep, stop.change, done)


def over_base(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """theta_0 is given: each delta_i is one shrinking."""
    zero = torch.zeros_like(start[0].value)
    objective = problem.objective(zero, start)
    limits.report(1, objective, 0.0)
    return Outcome(start, objective, 1, 0.0, True)


class _Stop:
    """Stops a linearly converging iteration: what is left is ``change rho / (1 - rho)``."""

    def __init__(self, limits: Limits, floor: float):
        self._limits, self._floor = limits, floor
        self._before = math.inf
        self.change = 0.0

    def __call__(self, count: int, objective: float, moved: float, size: float) -> bool:
        self.change = _relative(moved, size)
        self._limits.report(count, objective, self.change)
        rate = min(moved / self._before, 0.999) if self._before > 0.0 else 0.0
        left = max(moved, moved * rate / (1.0 - rate)) if count > 1 else moved
        self._before = moved
        return left <= max(self._limits.enough(size), self._floor)


def _relative(moved: float, size: float) -> float:
    return moved / size if size > 0.0 else 0.0


UPDATES: dict[str, Callable[[Problem, list[Shrunk], Limits], Outcome]] = {
    "simultaneous": simultaneous,
    "sequential": sequential,
}
