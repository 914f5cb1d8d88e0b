r"""Where a rule is applied to the factors of one module: a registry of spaces.

`delta` means the change itself. Rotation-invariant rules get its core, which is the same
(`algebra.core_space`); elementwise ones the dense matrix. The others are asked for by name, since
an elementwise rule gives something else in them:

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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.declared import Call, Method
from mergekit_ext.declared.method import Pieces
from mergekit_ext.errors import MergeError
from mergekit_ext.kernels.linear_algebra import matmul
from mergekit_ext.kernels.numerics import all_finite
from mergekit_ext.kernels.truncated import leading
from peft_merge.adapter import Update
from peft_merge.algebra.core_space import EPS, CoreSpace, Factored, Rank, chosen

# Entries of a block of rows of a dense change: for the caches of a CPU, for few large kernels.
BLOCK = 1 << 16
_ACCELERATOR_BLOCK = 1 << 22
# A merged change up to this size is held in float64, a larger one in float32.
SMALL = 1 << 20
# Singular values below this share of the largest are rounding of the merged change.
_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}

Result = tuple[Factored, dict[str, Any]]


def block_length(device: str) -> int:
    """Return how many entries of a dense change are made at once on a kind of device."""
    return BLOCK if device == "cpu" else _ACCELERATOR_BLOCK


@dataclass(frozen=True)
class Job:
    """One module to be merged."""

    updates: Sequence[Update]  # of m adapters
    shape: tuple[int, int, int]  # (n, rows, columns)
    rule: Method
    call: Call
    rank: Rank | None  # see `chosen`; None for no loss, or of dense changes the sum of the ranks
    device: str | torch.device

    @cached_property
    def space(self) -> CoreSpace:
        """The changes in their common coordinates."""
        return CoreSpace.of(self.updates, self.device)

    def slots(self, stacks: Sequence[Tensor], call: Call) -> tuple[Tensor, dict[str, Any]]:
        """Return the rule's result on each matrix of m stacks of n, by itself, and its details."""
        merged = [self.rule.apply([*each], call) for each in zip(*stacks, strict=True)]
        details = {name: said for result in merged for name, said in result.details.items()}
        return _require_finite(torch.stack([result.tensor for result in merged])), details

    def factor(self, space: CoreSpace, core: Tensor) -> Factored:
        return space.factor(core, "lossless" if self.rank is None else self.rank)

    def refactored(self, a: Tensor, b: Tensor) -> Factored:
        """Return the balanced factors of ``B A``."""
        space = CoreSpace.of([Update(a, b, 1.0)], self.device)
        return self.factor(space, space.cores[0])

    def balanced(self) -> list[Update]:
        """Return the same changes in float64 with the root of the scaling in both factors."""
        found = []
        for update in self.updates:
            root = math.sqrt(abs(update.scale))
            a = update.a.to(self.device, torch.float64) * root
            b = update.b.to(self.device, torch.float64) * math.copysign(root, update.scale)
            found.append(Update(a, b, 1.0))
        return found


def _delta(job: Job) -> Result:
    if not job.rule.invariant(job.call.options):
        return _dense(job)
    merged, details = job.slots(job.space.cores, job.call)
    return job.factor(job.space, merged), details


def _core(job: Job) -> Result:
    if job.rule.invariant(job.call.options):
        return _delta(job)
    # Balanced, so that no side's axes depend on where the scaling is.
    space = CoreSpace.of(job.balanced(), job.device)
    # The left singular vectors of the coordinates are the principal axes of the stacked factors.
    sides = (space.left.coordinates, space.right.coordinates)
    left, right = (torch.linalg.svd(side, full_matrices=True)[0] for side in sides)
    merged, details = job.slots([left.mT @ core @ right for core in space.cores], job.call)
    return job.factor(space, left @ merged @ right.mT), details


def _knots(job: Job) -> Result:
    space = job.space
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
    updates = job.balanced()
    rank = max(update.a.shape[-2] for update in updates)  # of all that have the module
    for side in ("a", "b"):
        # The sign of a weight goes to B.
        roots = [math.sqrt(abs(weight)) for weight in job.call.weights]
        if side == "b":
            roots = list(map(math.copysign, roots, job.call.weights))
        stacks = [getattr(update.filled(rank), side) for update in updates]
        sides[side], said = job.slots(stacks, replace(job.call, weights=roots))
        if said:
            details[side] = said
    return job.refactored(sides["a"], sides["b"]), details


SPACES: Mapping[str, Callable[[Job], Result]]
SPACES = {"delta": _delta, "core": _core, "factors": _factors, "knots": _knots}


def _dense(job: Job) -> Result:
    """Merge the dense changes, one of the n matrices at a time; details are those of the last.

    A rule that reads rows in pieces (`Method.blockwise`) gets each :math:`D_i = s_i B_i A_i` in
    blocks of rows, in float64, made from the factors whenever they are read, so that only the
    merged change is held whole. Other rules need all m changes at once.
    """
    n, rows, columns = job.shape
    rank = job.rank
    if rank is None:
        rank = min(sum(update.a.shape[-2] for update in job.updates), rows, columns)
    wanted = min(rank, rows, columns) if isinstance(rank, int) else None
    dtype = torch.float64 if rows * columns <= SMALL else torch.float32
    step = max(1, block_length(torch.device(job.device).type) // columns)
    starts = range(0, rows, step)
    details: dict[str, Any] = {}

    def source(update: Update, index: int) -> Pieces:
        b = update.b[index].to(job.device, torch.float64) * update.scale
        a = update.a[index].to(job.device, torch.float64)
        return lambda: (matmul(b[start : start + step], a) for start in starts)

    def whole(pieces: Iterable[Tensor]) -> Tensor:
        out = torch.empty((rows, columns), dtype=dtype, device=job.device)
        at = 0
        for piece in pieces:
            out[at : at + len(piece)] = piece
            at += len(piece)
        return _require_finite(out)

    def merged(index: int) -> Tensor:
        sources = [source(update, index) for update in job.updates]
        if job.rule.blockwise is not None:
            return whole(job.rule.blockwise(sources, job.call))
        result = job.rule.apply([whole(each()) for each in sources], job.call)
        details.update(result.details)
        return whole([result.tensor])

    found = [leading(merged(index), wanted) for index in range(n)]
    sigma = torch.stack([part.sigma for part in found])
    kept = chosen(sigma, rank, _FLOOR[dtype])
    roots = sigma[:, None, :kept].sqrt()
    u = torch.stack([part.u[:, :kept] for part in found])
    v = torch.stack([part.v[:, :kept] for part in found])
    left = sum(part.rest**2 for part in found) + float(sigma[:, kept:].square().sum())
    total = sum(part.whole**2 for part in found)
    error = (left / total) ** 0.5 if total else 0.0
    return Factored((v * roots).mT.contiguous(), u * roots, sigma[:, :kept], error), details


def _require_finite(tensor: Tensor) -> Tensor:
    if not all_finite(tensor):
        raise MergeError(
            "the merge gives values that are not finite from finite inputs. Use smaller weights."
        )
    return tensor
