r"""Where a rule is applied to the factors of one module: a registry of spaces.

`delta` means the change itself. Rotation-invariant rules get its core, which is the same
(`algebra.core_space`); elementwise ones the dense matrix (`algebra.dense`). The others are asked
for by name, since an elementwise rule gives something else in them:

- `core`: on the cores. Their axes are the principal axes of the stacked factors (Panariello et al.
  2025, "Accurate and Efficient Low-Rank Model Merging in Core Space", section 3), so that the
  result does not depend on the order of the adapters.
- `knots`: on the parts :math:`\Sigma V_i^T` of the common decomposition
  :math:`[D_1 \dots D_m] = U \Sigma [V_1^T \dots V_m^T]` (Stoica et al. 2025, "Model Merging with
  SVD to Tie the Knots"); the merged change is U times theirs. Section 4 writes the method on
  :math:`V_i^T`; the authors' code trims :math:`\Sigma V_i^T`, where an entry counts by what it
  changes, and so does this.
- `factors`: on A and on B, each by itself, as PEFT's `linear`, `ties` and so on do: the product of
  merged factors is not the merge of products. Adapters must have equal ranks. As in PEFT, the
  roots of weight and scaling go to either side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.methods import Call, Method
from peft_merge.adapter import Update
from peft_merge.algebra import dense
from peft_merge.algebra.core_space import CoreSpace
from peft_merge.algebra.truncated import EPS, Factored, Rank, chosen


@dataclass(frozen=True)
class Job:
    """One module to be merged.

    Attributes:
        updates: of m adapters, None for one that does not have the module.
        shape: (n, rows, columns).
        rule: to be applied.
        call: with weights, options and generators.
        rank: None for the default.
        device: where to compute.
    """

    updates: Sequence[Update | None]
    shape: tuple[int, int, int]
    rule: Method
    call: Call
    rank: Rank | None
    device: str | torch.device

    def slots(self, stacks: Sequence[Tensor], call: Call) -> tuple[Tensor, dict[str, Any]]:
        """Return the rule's result on each matrix of m stacks of n, by itself, and its details."""
        merged = [
            self.rule.apply([stack[index] for stack in stacks], call)
            for index in range(self.shape[0])
        ]
        details: dict[str, Any] = {}
        for result in merged:
            details.update(result.details)
        return dense.require_finite(torch.stack([result.tensor for result in merged])), details

    def factor(self, space: CoreSpace, core: Tensor) -> Factored:
        """Return the factors of a merged core, without loss unless a rank is asked for."""
        return space.factor(core, "lossless" if self.rank is None else self.rank)

    def refactored(self, a: Tensor, b: Tensor) -> Factored:
        """Return the balanced factors of ``B A``."""
        space = CoreSpace.of([Update(a, b, 1.0)], self.shape, self.device)
        return self.factor(space, space.cores[0])


Result = tuple[Factored, dict[str, Any]]


def _delta(job: Job) -> Result:
    if job.rule.invariant(job.call.options):
        space = CoreSpace.of(job.updates, job.shape, job.device)
        merged, details = job.slots(space.cores, job.call)
        return job.factor(space, merged), details
    rank = job.rank
    if rank is None:
        rank = min(sum(u.a.shape[-2] for u in job.updates if u is not None), *job.shape[1:])
    return dense.merge(job.updates, job.shape, job.rule, job.call, rank, job.device)


def _core(job: Job) -> Result:
    if job.rule.invariant(job.call.options):
        return _delta(job)
    # roots of the scaling on both sides, so that no side's axes depend on where the scaling is
    balanced = [None if u is None else _balanced(u, job.device) for u in job.updates]
    space = CoreSpace.of(balanced, job.shape, job.device)
    # The left singular vectors of the coordinates are the principal axes of the stacked factors.
    left, right = (
        torch.linalg.svd(basis.coordinates, full_matrices=True)[0]
        for basis in (space.left, space.right)
    )
    merged, details = job.slots([left.mT @ core @ right for core in space.cores], job.call)
    return job.factor(space, left @ merged @ right.mT), details


def _knots(job: Job) -> Result:
    space = CoreSpace.of(job.updates, job.shape, job.device)
    u, sigma, vh = torch.linalg.svd(torch.cat(space.cores, dim=-1), full_matrices=False)
    kept = chosen(sigma, "lossless", max(vh.shape[-2:]) * EPS)
    rows = sigma[:, :kept, None] * vh[:, :kept]
    width = space.cores[0].shape[-1]
    parts = [space.right.expand(part.mT).mT for part in rows.split(width, dim=-1)]
    merged, details = job.slots(parts, job.call)
    return job.refactored(merged, space.left.expand(u[..., :kept])), details


def _factors(job: Job) -> Result:
    sides: dict[str, Tensor] = {}
    details: dict[str, Any] = {}
    balanced = [None if u is None else _balanced(u, job.device) for u in job.updates]
    like = next(update for update in balanced if update is not None)
    for side in ("a", "b"):
        # The sign of a weight goes to B.
        roots = [math.sqrt(abs(weight)) for weight in job.call.weights]
        if side == "b":
            roots = list(map(math.copysign, roots, job.call.weights))
        nothing = torch.zeros_like(getattr(like, side))
        stacks = [nothing if update is None else getattr(update, side) for update in balanced]
        sides[side], said = job.slots(stacks, replace(job.call, weights=roots))
        if said:
            details[side] = said
    return job.refactored(sides["a"], sides["b"]), details


def _balanced(update: Update, device: str | torch.device) -> Update:
    """The same change in float64 with the root of the scaling in both factors."""
    root = math.sqrt(abs(update.scale))
    return Update(
        update.a.to(device, torch.float64) * root,
        update.b.to(device, torch.float64) * math.copysign(root, update.scale),
        1.0,
    )


SPACES: Mapping[str, Callable[[Job], Result]] = {
    "delta": _delta,
    "core": _core,
    "factors": _factors,
    "knots": _knots,
}
