"""The iterations of LoRE-Merging for one matrix of each model.

With D_i = theta_i - mean and theta_0 = mean - S, the simultaneous update of Algorithm 1 is the
fixed-point iteration ``S <- mean_i shrink(D_i + S)``. For thresholding it is gradient descent,
step 1/n, on the smooth convex function of S that is left when every delta_i is minimised out, with
gradient n (S - mean_i shrink(D_i + S)); so quasi-Newton steps go to the same minimiser in fewer
evaluations. L-BFGS with the identity as its first guess starts as Algorithm 1 and speeds it up
from what it saw. Rank truncation is not convex and the sequential update need not have one limit:
these are iterated as the paper has them.

Singular values that sink below mu on the way raise the curvature, so that early steps are too long.
The length of a step over that of the gradient is therefore limited: at first to 2, then to twice
what was last accepted. Measured: next to no step is rejected, without the limit up to a third.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.kernels.linear_algebra import inner, norm
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
# Secant pairs kept: two matrices each. Measured: 3 costs up to 15% more iterations, 8 saves 4%.
MEMORY = 5
FIRST_REACH = 2.0


def shrinker_for(device: str, shape: torch.Size) -> Shrinker:
    """Return how matrices of a shape are shrunk on a kind of device."""
    by_products = device == "cuda" and min(shape) >= MATMUL_LEAST
    return MatmulShrinker() if by_products else WarmShrinker()


@dataclass(frozen=True)
class Limits:
    """When to stop, and what is called: ``on_iteration(iteration, objective, change)``."""

    max_iterations: int
    tolerance: float
    on_iteration: Callable[[int, float, float], None] | None = None

    def report(self, count: int, objective: float, change: float) -> None:
        if self.on_iteration is not None:
            self.on_iteration(count, objective, change)


@dataclass(frozen=True)
class Point:
    """All delta_i thresholded at one S, then theta_0 solved for them (S becomes `mean`)."""

    at: Tensor
    parts: list[Shrunk]
    mean: Tensor
    gradient: Tensor
    objective: float


@dataclass(frozen=True)
class Outcome:
    """The delta_i that a solver found and their mean, in the coordinates that it was given."""

    parts: list[Shrunk]
    mean: Tensor
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
        return Point(at, parts, mean, gradient, objective)

    def objective(self, at: Tensor, parts: list[Shrunk]) -> float:
        terms = [0.0]
        for difference, part in zip(self.differences, parts, strict=True):
            terms.append(0.5 * norm((difference + at).sub_(part.value)) ** 2)
            terms.append((self.rule.mu or 0.0) * part.nuclear)
        return math.fsum(terms)

    def evaluate(self, at: Tensor) -> Point:
        pairs = zip(self.shrinkers, self.differences, strict=True)
        return self.point(at, [s.shrink(d + at) for s, d in pairs])

    def settle(self, last: Point, accuracy: float) -> Point:
        """Evaluate the last point once more, with settled subspaces."""
        triples = zip(self.shrinkers, self.differences, last.parts, strict=True)
        parts = [s.settle(d + last.at, accuracy, part) for s, d, part in triples]
        return self.point(last.at, parts)


class Secants:
    """Limited-memory BFGS (Nocedal 1980): approximates H^-1 g from the last `MEMORY` steps."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=MEMORY)
        self._reach = FIRST_REACH
        self._stretch = 1.0

    def learn(self, before: Point, after: Point) -> None:
        """Take in a step and the change of the gradient along it (dropped if not convex)."""
        step, turn = after.at - before.at, after.gradient - before.gradient
        curvature = inner(step, turn)
        if curvature > 1e-6 * norm(step) * norm(turn):
            self._pairs.append((step, turn, 1.0 / curvature))

    def step(self, gradient: Tensor) -> tuple[Tensor, float]:
        """Return the step to subtract, and its norm before a limit has shortened it."""
        step = self._solved(gradient)
        length, unit = norm(step), norm(gradient)
        self._stretch = length / unit if unit > 0.0 else 1.0
        if self._stretch > self._reach:
            step.mul_(self._reach / self._stretch)
            self._stretch = self._reach
        return step, length

    def judge(self, accepted: bool) -> None:
        """After a step that was kept the next may be twice as long; else it is half as long."""
        if accepted:
            self._reach = max(self._reach, 2.0 * self._stretch)
        else:
            self._reach = max(1.0, 0.5 * self._stretch)

    def _solved(self, gradient: Tensor) -> Tensor:
        # The two-loop recursion; the gradient itself while nothing was learned.
        result = gradient.clone()
        shares = []
        for step, turn, scale in reversed(self._pairs):
            share = scale * inner(step, result)
            result.add_(turn, alpha=-share)
            shares.append(share)
        for (step, turn, scale), share in zip(self._pairs, reversed(shares), strict=True):
            result.add_(step, alpha=share - scale * inner(turn, result))
        return result


def simultaneous(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """Algorithm 1. `start` holds the shrunk D_i, its first iteration."""
    descend = accelerated if problem.rule.mu is not None and len(start) > 2 else plain
    return descend(problem, start, limits)


def accelerated(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """Quasi-Newton steps; one that raises the objective gives way to a step of Algorithm 1.

    Stops when both the step to take and the gradient are below tolerance; the point is then
    evaluated again with settled subspaces before it counts. Scratch: about 2 (MEMORY + 3)
    matrices besides those of the shrinkers.
    """
    slack = 1.0 + 4.0 * torch.finfo(start[0].value.dtype).eps
    floor, largest = problem.floor, problem.size
    secants = Secants()
    now = problem.point(torch.zeros_like(start[0].value), start)
    count, change = 1, _relative(norm(now.gradient), norm(now.mean))
    limits.report(count, now.objective, change)
    converged = True
    while norm(now.gradient) > 0.0:
        size = norm(now.mean)
        enough = max(limits.tolerance * size, floor)
        noise = max(shrinker.noise for shrinker in problem.shrinkers) * largest
        step, length = secants.step(now.gradient)
        if max(length, norm(now.gradient)) <= max(enough, noise):
            settled = problem.settle(now, SETTLED_SHARE * enough)
            moved = norm(settled.mean - now.mean)
            now = settled
            step, length = secants.step(now.gradient)
            change = _relative(length, size)
            if moved <= enough + floor and max(length, norm(now.gradient)) <= enough:
                break
        converged = count < limits.max_iterations
        if not converged:
            break
        trial = problem.evaluate(now.at - step)
        count += 1
        secants.learn(now, trial)
        accepted = trial.objective <= slack * now.objective
        secants.judge(accepted)
        if not accepted:
            converged = count < limits.max_iterations
            if not converged:
                break
            trial = problem.evaluate(now.mean)
            count += 1
            secants.learn(now, trial)
        change = _relative(norm(trial.mean - now.mean), norm(trial.mean))
        now = trial
        limits.report(count, now.objective, change)
    return Outcome(now.parts, now.mean, now.objective, count, change, converged)


def plain(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """Algorithm 1 as written: theta_0, then every delta_i from it."""
    now = problem.point(torch.zeros_like(start[0].value), start)
    stop = _Stop(limits, problem.floor)
    count, done = 1, stop(1, now.objective, norm(now.gradient), norm(now.mean))
    while not done and count < limits.max_iterations:
        now = problem.evaluate(now.mean)
        count += 1
        done = stop(count, now.objective, norm(now.gradient), norm(now.mean))
    return Outcome(now.parts, now.mean, now.objective, count, stop.change, done)


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
        accuracy = SETTLED_SHARE * max(limits.tolerance * norm(mean), problem.floor)
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
    return Outcome(parts, exact, problem.objective(exact, parts), sweep, stop.change, done)


def over_base(problem: Problem, start: list[Shrunk], limits: Limits) -> Outcome:
    """theta_0 is given: each delta_i is one shrinking."""
    zero = torch.zeros_like(start[0].value)
    objective = problem.objective(zero, start)
    limits.report(1, objective, 0.0)
    return Outcome(start, zero, objective, 1, 0.0, True)


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
        return left <= max(self._limits.tolerance * size, self._floor)


def _relative(moved: float, size: float) -> float:
    return moved / size if size > 0.0 else 0.0


UPDATES: dict[str, Callable[[Problem, list[Shrunk], Limits], Outcome]] = {
    "simultaneous": simultaneous,
    "sequential": sequential,
}
