"""Low-rank residuals: a base for all tasks, and what each task adds to its matrices.

theta_0 is made of all tasks by another algorithm. Of each task's matrices the truncated singular
value decomposition of theta_i - theta_0 is stored, of its small tensors (norms, biases) the whole.
Ranks are chosen over all tasks and matrices together (`kernels.ranks`). `flexmerge.decomposition`
computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergekit_ext.core.parameters import Count, Parameter, Share, choice
from mergekit_ext.errors import ConfigError
from mergekit_ext.flexmerge.algorithm import Algorithm, Parameters
from mergekit_ext.flexmerge.layout import BlockLayout, Layout, Part
from mergekit_ext.flexmerge.manifest import RESIDUAL
from mergekit_ext.flexmerge.plan import Plan, Planner
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.flexmerge.storage import Size, Storage, Target
from mergekit_ext.flexmerge.stored import StoredGroup
from mergekit_ext.kernels.ranks import allocate

GIVEN = "given"  # as the base: the base model itself
PARAMETERS = (
    Parameter("vectors", choice("own", "shared"), "own", "what becomes of small tensors"),
    Parameter(
        "embeddings", choice("low_rank", "own", "shared"), "low_rank", "what becomes of embeddings"
    ),
    Parameter("rank", Count | None, None, "the rank of all residuals, in place of a size"),
    Parameter("energy", Share | None, None, "the share of their squared norms that is kept"),
    Parameter("max_rank", Count | None, None, "the largest rank of a residual"),
    Parameter("rank_multiple", Count, 1, "of which ranks are multiples, where a matrix allows it"),
)


class Residual(Algorithm):
    """One base for all tasks, with low-rank residuals.

    Shared parameters: `vectors` and `embeddings`, what becomes of small tensors and of embeddings
    (``own``, ``shared``, or of embeddings ``low_rank``), `max_rank` and `rank_multiple`. A task's
    `weight` (its size) is also that of its squared error. `base` makes theta_0; None takes the base
    model.
    """

    name = "residual"

    def __init__(self, base: Algorithm | None, parameters: Parameters):
        super().__init__(parameters)
        self.base = base
        if base is not None:
            self.trims, self.by_tensor = base.trims, base.by_tensor

    def merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return theta_0, (n,), in `dtype`."""
        return self._merge(block, members, dtype)

    def treatment(self, block: BlockLayout, part: Part) -> str:
        """Return what becomes of a tensor: ``low_rank``, ``own`` or ``shared``."""
        options = self.parameters.shared
        _, rows, columns = part.matrix_shape
        if rows * columns <= rows + columns:
            return str(options["vectors"])
        return str(options["embeddings"]) if block.kind == "embedding" else "low_rank"

    def largest_rank(self, part: Part) -> int:
        """Return the largest rank that a residual may have."""
        _, rows, columns = part.matrix_shape
        return min(rows, columns, self.parameters.shared["max_rank"] or rows)

    def _copies(self, models: int, square: float) -> float:
        # Beside what makes theta_0, factors of all tasks up to half of the block, and one SVD.
        base = 0.0 if self.base is None else self.base.copies(models, square)
        return max(base, models / 2 + 8)

    def _merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.base is None:
            return block.base.to(dtype)
        self.base.cuts = self.cuts
        return self.base.merge(block, members, dtype)


@dataclass(frozen=True)
class Limit:
    """How much residuals may be: so many bytes, or one rank, or a share of the squared norms."""

    budget: float = math.inf
    rank: int | None = None
    energy: float | None = None


class ResidualStorage(Storage):
    """How a base and residuals are stored; a group of it is one of all tasks."""

    def __init__(self, layout: Layout, algorithm: Residual, forced: torch.dtype | None = None):
        super().__init__(layout, forced=forced)
        self.algorithm = algorithm

    @cached_property
    def matrices(self) -> list[tuple[int, Part]]:
        """The tensors that have residuals, with the index of their block."""
        return [
            (index, part)
            for index, block in enumerate(self.layout.blocks)
            for part in block.parts
            if self.algorithm.treatment(block, part) == "low_rank"
        ]

    def group(self, block: int, ranks: Mapping[int, Mapping[str, int]]) -> StoredGroup:
        """Return what is stored of a block with these ranks, by task and tensor."""
        layout, everyone = self.layout.blocks[block], tuple(range(self.tasks))
        return StoredGroup(
            everyone,
            RESIDUAL,
            own=tuple(
                part.name
                for part in layout.parts
                if self.algorithm.treatment(layout, part) == "own"
            ),
            stacked=tuple(p.name for p in layout.parts if p.layout == "stacked"),
            ranks={task: ranks.get(task, {}) for task in everyone},
        )

    def cost(self, part: Part) -> int:
        """Return the bytes of one triplet."""
        count, rows, columns = part.matrix_shape
        dtype = self.forced or part.dtype(range(self.tasks))
        return count * (rows + columns) * dtype.itemsize

    @cached_property
    def least(self) -> Size:
        """The base and what tasks store themselves, without residuals."""
        blocks = range(self.blocks)
        return self.size(sum(self.bytes(block, [self.group(block, {})]) for block in blocks))

    def ranks(self, spectra: Sequence[Spectrum], limit: Limit) -> tuple[int, ...]:
        """Return the ranks of residuals: of each of `matrices` those of all tasks."""
        tasks, parameters = range(self.tasks), self.algorithm.parameters
        if limit.rank is not None:
            most = (self.algorithm.largest_rank(part) for _, part in self.matrices)
            return tuple(min(limit.rank, top) for top in most for _ in tasks)
        weights = [abs(weight) for weight in parameters.weights(list(tasks))]
        whole = (s.whole[task] * weights[task] for s in spectra for task in tasks)
        return allocate(
            [spectrum.squares[task] * weights[task] for spectrum in spectra for task in tasks],
            [self.cost(part) for _, part in self.matrices for _ in tasks],
            budget=limit.budget,
            goal=math.inf if limit.energy is None else limit.energy * math.fsum(whole),
            multiple=parameters.shared["rank_multiple"],
        )

    def budget(self, target: Target) -> int:
        """Return the bytes that residuals may take."""
        least = self.least
        if target.bytes is not None:
            return target.bytes - least.bytes
        return math.floor((target.models or 0) * (1 + 1e-9) * least.unit_bytes) - (
            least.bytes - least.private_bytes
        )


@dataclass(frozen=True)
class Spectrum:
    """Of the residuals of one tensor: (m, k) leading squared singular values, summed over stacked
    matrices, and (m,) whole squared norms.
    """

    squares: Tensor
    whole: Tensor


class Residuals(Planner):
    """Ranks that leave the least squared error.

    `measured` returns the spectra of `storage.matrices`, in order, as deep as a limit needs.
    """

    def __init__(self, storage: ResidualStorage, measured: Callable[[Limit], Sequence[Spectrum]]):
        self.storage: ResidualStorage = storage
        self._measured = measured

    def reaches(self, target: Target) -> bool:
        return self.storage.problem(target) is None

    @property
    def sizes(self) -> list[float]:
        least, most = self.storage.least.models, float(self.storage.tasks)
        return [*(float(n) for n in range(self.storage.tasks, 0, -1) if least < n <= most), least]

    def plan(self, target: Target) -> Plan:
        storage = self.storage
        given = storage.algorithm.parameters.shared
        if given["rank"] is not None or given["energy"] is not None:
            return self.within(Limit(rank=given["rank"], energy=given["energy"]))
        if problem := storage.problem(target):
            raise ConfigError([problem])
        if target.holds(storage.size(storage.whole)):
            return Plan((storage.apart,) * storage.blocks, storage.size(storage.whole))
        return self.within(Limit(storage.budget(target)))

    def within(self, limit: Limit) -> Plan:
        """Return the plan whose residuals are as large as `limit` says."""
        storage = self.storage
        found = iter(storage.ranks(self._measured(limit), limit))
        ranks: list[dict[int, dict[str, int]]] = [{} for _ in range(storage.blocks)]
        for block, part in storage.matrices:
            for task in range(storage.tasks):
                if rank := next(found):
                    ranks[block].setdefault(task, {})[part.name] = rank
        groups = tuple((storage.group(block, found),) for block, found in enumerate(ranks))
        return Plan(groups, storage.size(sum(map(storage.bytes, range(storage.blocks), groups))))
