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

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_merge.adapter import Update
from peft_merge.algebra import dense
from peft_merge.algebra.core_space import CoreSpace
from peft_merge.algebra.truncated import EPS, Factored, Rank
from peft_merge.rules.base import Call, Rule


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
    rule: Rule
    call: Call
    rank: Rank | None
    device: str | torch.device

    @property
    def present(self) -> list[Update]:
        return [update for update in self.updates if update is not None]

    def slots(self, stacks: Sequence[Tensor], call: Call) -> tuple[Tensor, dict[str, Any]]:
        """The rule on each matrix of m stacks of n, by itself; its details."""
        merged = [
            self.rule.merge([stack[index] for stack in stacks], call)
            for index in range(self.shape[0])
        ]
        details: dict[str, Any] = {}
        for result in merged:
            details.update(result.details)
        return dense.require_finite(torch.stack([result.tensor for result in merged])), details


Result = tuple[Factored, dict[str, Any]]


def _delta(job: Job) -> Result:
    if job.rule.invariant_with(job.call.options):
        space = CoreSpace.of(job.updates, job.shape, job.device)
        merged, details = job.slots(space.cores, job.call)
        return space.factor(merged, "lossless" if job.rank is None else job.rank), details
    rank = job.rank
    if rank is None:
        rank = min(sum(u.a.shape[-2] for u in job.present), *job.shape[1:])
    return dense.merge(job.updates, job.shape, job.rule, job.call, rank, job.device)


def _core(job: Job) -> Result:
    if job.rule.invariant_with(job.call.options):
        return _delta(job)
    # roots of the scaling on both sides, so that no side's axes depend on where the scaling is
    balanced = [None if u is None else _balanced(u, job.device) for u in job.updates]
    space = CoreSpace.of(balanced, job.shape, job.device)
    left, right = (_principal(basis.coordinates) for basis in (space.left, space.right))
    turned = [left.mT @ core @ right for core in space.cores]
    merged, details = job.slots(turned, job.call)
    return _lossless(space, left @ merged @ right.mT, job.rank), details


def _knots(job: Job) -> Result:
    space = CoreSpace.of(job.updates, job.shape, job.device)
    u, sigma, vh = torch.linalg.svd(torch.cat(space.cores, dim=-1), full_matrices=False)
    numerical = int((sigma > max(vh.shape[-2:]) * EPS * sigma[:, :1]).sum(dim=1).max())
    kept = max(1, numerical)
    width = space.cores[0].shape[-1]
    rows = sigma[:, :kept, None] * vh[:, :kept]
    parts = [space.right.expand(part.mT).mT for part in rows.split(width, dim=-1)]
    merged, details = job.slots(parts, job.call)
    return _refactored(Update(merged, space.left.expand(u[..., :kept]), 1.0), job), details


def _factors(job: Job) -> Result:
    present = job.present
    sides = []
    details: dict[str, Any] = {}
    for side, sign in (("a", False), ("b", True)):
        call = dataclasses.replace(job.call, weights=_roots(job.call.weights, sign))
        like = getattr(present[0], side)
        stacks = [
            torch.zeros(like.shape, dtype=torch.float64, device=job.device)
            if update is None
            else getattr(_balanced(update, job.device), side)
            for update in job.updates
        ]
        merged, said = job.slots(stacks, call)
        details[side] = said
        sides.append(merged)
    return _refactored(Update(sides[0], sides[1], 1.0), job), {
        side: said for side, said in details.items() if said
    }


def _roots(weights: Sequence[float], signed: bool) -> list[float]:
    """The sign of a weight goes to B."""
    roots = [math.sqrt(abs(weight)) for weight in weights]
    if not signed:
        return roots
    return [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]


def _balanced(update: Update, device: str | torch.device) -> Update:
    """The same change in float64 with the root of the scaling in both factors."""
    root = math.sqrt(abs(update.scale))
    return Update(
        update.a.to(device, torch.float64) * root,
        update.b.to(device, torch.float64) * math.copysign(root, update.scale),
        1.0,
    )


def _principal(coordinates: Tensor) -> Tensor:
    """The left singular vectors: principal axes of the stacked factors."""
    u, _, _ = torch.linalg.svd(coordinates, full_matrices=True)
    return u


def _lossless(space: CoreSpace, core: Tensor, rank: Rank | None) -> Factored:
    return space.factor(core, "lossless" if rank is None else rank)


def _refactored(update: Update, job: Job) -> Factored:
    space = CoreSpace.of([update], job.shape, job.device)
    return _lossless(space, space.cores[0], job.rank)


SPACES: Mapping[str, Callable[[Job], Result]] = {
    "delta": _delta,
    "core": _core,
    "factors": _factors,
    "knots": _knots,
}
