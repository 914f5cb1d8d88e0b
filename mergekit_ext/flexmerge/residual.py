"""Low-rank residuals: a base for all tasks, and what each task adds to its matrices.

theta_0 is made of all tasks by another algorithm. Of each task's matrices the truncated singular
value decomposition of theta_i - theta_0 is stored, of its small tensors (norms, biases) the whole.
Ranks are chosen over all tasks and matrices together (`kernels.ranks`). `flexmerge.decomposition`
computes them.
"""

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_ext.core.parameters import Count, Parameter, Share, choice
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.algorithm import Algorithm, Parameters
from mergekit_ext.flexmerge.layout import BlockLayout, Layout, Part
from mergekit_ext.flexmerge.plan import Plan, Planner
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.flexmerge.storage import Size, Storage, Target
from mergekit_ext.flexmerge.stored import StoredGroup
from mergekit_ext.kernels.ranks import allocate

# Of a limit that all matrices keep to.
_ANY_RANK = 1 << 62
DECOMPOSING = 10  # copies of a matrix
GIVEN = "given"  # as the base: the base model itself
CHECKPOINT, ADAPTERS = "checkpoint", "adapters"
# What becomes of a tensor.
LOW_RANK, OWN, SHARED = "low_rank", "own", "shared"
PARAMETERS = (
    Parameter("output", choice(CHECKPOINT, ADAPTERS), CHECKPOINT, "in which form it is written"),
    Parameter("vectors", choice(OWN, SHARED), OWN, "what becomes of small tensors"),
    Parameter(
        "embeddings", choice(LOW_RANK, OWN, SHARED), LOW_RANK, "that of embeddings and heads"
    ),
    Parameter("rank", Count | None, None, "the rank of all residuals, in place of a size"),
    Parameter("energy", Share | None, None, "the share of their squared norms that is kept"),
    Parameter("max_rank", Count | None, None, "the largest rank of a residual"),
    Parameter("rank_multiple", Count, 1, "of which ranks are multiples, where a matrix allows it"),
    Parameter("uniform_rank", bool, False, "one rank in all of an adapter, filled with zeros"),
)


class Residual(Algorithm):
    """One base for all tasks, with low-rank residuals.

    Shared parameters: `vectors`, what becomes of small tensors (``own`` or ``shared``),
    `embeddings`, what of embeddings and of a head that no task has for itself (or ``low_rank``),
    `max_rank` and `rank_multiple`. A task's `weight` (its size) is also that of its squared error.
    `base` makes theta_0; None takes the base model.
    """

    name = "residual"
    use = "Tasks that stay close to their own models in the space of one or two."

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
        return str(options["embeddings"]) if block.kind in ("embedding", "head") else LOW_RANK

    def largest_rank(self, part: Part) -> int:
        """Return the largest rank that a residual may have."""
        _, rows, columns = part.matrix_shape
        return min(rows, columns, self.parameters.shared["max_rank"] or rows)

    def _copies(self, models: int, square: float) -> float:
        # What makes theta_0, or one decomposition; its factors are `ResidualStorage.factors`.
        return max(0.0 if self.base is None else self.base.copies(models, square), DECOMPOSING)

    def _merge(self, block: BlockData, members: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.base is None:
            return block.base.to(dtype)
        self.base.cuts = self.cuts
        return self.base.merge(block, members, dtype)


class _Unit(NamedTuple):
    """Matrices that have one rank, by their indices."""

    matrices: Sequence[int]
    largest: int  # rank
    least: int  # that all tasks have
    cost: int  # bytes of one triplet of each


@dataclass(frozen=True)
class Limit:
    """How much residuals may be: so many bytes, or one rank, or a share of the squared norms."""

    budget: float = math.inf
    rank: int | None = None
    energy: float | None = None


class ResidualStorage(Storage):
    """How a base and residuals are stored; a group of it is one of all tasks.

    With `treatments`, those of all tensors as adapters allow them, what a task has is an adapter,
    and the base is a model that also has what tasks store themselves. Then `units` say which
    tensors with residuals have one rank, and how often an adapter holds the factors of each; those
    in `held` have a residual in every task, however small it is; and `private_bytes` are those of
    what no other task has, in base and adapters.
    """

    def __init__(
        self,
        layout: Layout,
        algorithm: Residual,
        forced: torch.dtype | None = None,
        treatments: Mapping[str, str] | None = None,
        units: Sequence[Mapping[str, int]] = (),
        held: Collection[str] = (),
        private_bytes: int | None = None,
    ):
        super().__init__(layout, forced=forced)
        self.algorithm, self._treatments, self._held = algorithm, treatments, held
        self._counts = {name: count for unit in units for name, count in unit.items()}
        self._together = {name: number for number, unit in enumerate(units) for name in unit}
        self._uniform: bool = algorithm.parameters.shared["uniform_rank"]
        self.adapted = treatments is not None
        if private_bytes is not None:
            self.private_bytes = private_bytes

    @cached_property
    def matrices(self) -> list[tuple[int, Part]]:
        """The tensors that have residuals, with the index of their block."""
        return [
            (index, part)
            for index, block in enumerate(self.layout.blocks)
            for part in block.parts
            if self.treatment(block, part) == LOW_RANK
        ]

    @cached_property
    def _units(self) -> list[_Unit]:
        """Those of `matrices` that have one rank."""
        units: dict[Any, list[int]] = {}
        for index, (_, part) in enumerate(self.matrices):
            key = "" if self._uniform else self._together.get(part.name, part.name)
            units.setdefault(key, []).append(index)
        step: int = self.algorithm.parameters.shared["rank_multiple"]

        def unit(indices: Sequence[int]) -> _Unit:
            parts = [self.matrices[index][1] for index in indices]
            largest = max(map(self.algorithm.largest_rank, parts))
            held = self._uniform or any(part.name in self._held for part in parts)
            cost = sum(map(self.cost, parts))
            return _Unit(indices, largest, min(step, largest) if held else 0, cost)

        return [*map(unit, units.values())]

    def treatment(self, block: BlockLayout, part: Part) -> str:
        """Return what becomes of a tensor."""
        if self._treatments is None:
            return self.algorithm.treatment(block, part)
        return self._treatments[part.name]

    def group(self, block: int, ranks: Mapping[int, Mapping[str, int]]) -> StoredGroup:
        """Return what is stored of a block with these ranks, by task and tensor."""
        layout, everyone = self.layout.blocks[block], tuple(range(self.tasks))
        return StoredGroup(
            everyone,
            "residual",
            own=tuple(p.name for p in layout.parts if self.treatment(layout, p) == OWN),
            stacked=tuple(p.name for p in layout.parts if p.layout == "stacked"),
            ranks={task: ranks.get(task, {}) for task in everyone},
        )

    def bytes(self, block: int, groups: Sequence[StoredGroup]) -> int:
        own = groups[0].own if self.adapted else ()
        parts = [part for part in self.layout.blocks[block].parts if part.name in own]
        dtypes = [self.forced or part.dtype(range(self.tasks)) for part in parts]
        counts = zip((math.prod(part.shape) for part in parts), dtypes, strict=True)
        return super().bytes(block, groups) + sum(n * dtype.itemsize for n, dtype in counts)

    def cost(self, part: Part) -> int:
        """Return the bytes of one triplet."""
        count, rows, columns = part.matrix_shape
        dtype = self.forced or part.dtype(range(self.tasks))
        return count * (rows + columns) * dtype.itemsize * self._counts.get(part.name, 1)

    def factors(self, block: BlockLayout) -> int:
        """Return how many numbers all tasks' factors of one tensor of a block have at most."""
        rank = self.algorithm.parameters.shared["rank"] or _ANY_RANK
        parts = [part for part in block.parts if self.treatment(block, part) == LOW_RANK]
        each = (sum(p.matrix_shape[1:]) * min(rank, self.algorithm.largest_rank(p)) for p in parts)
        stacks = (part.matrix_shape[0] for part in parts)
        return self.tasks * max(map(operator.mul, stacks, each), default=0)

    @cached_property
    def bare(self) -> int:
        """Bytes of the base and of what tasks store themselves, without residuals."""
        return sum(self.bytes(block, [self.group(block, {})]) for block in range(self.blocks))

    @cached_property
    def least(self) -> Size:
        held = sum(unit.least * unit.cost for unit in self._units)
        return self.size(self.bare + self.tasks * held)

    @cached_property
    def most(self) -> Size:
        """All tasks apart, or of adapters all residuals at the largest rank that they may have."""
        if not self.adapted:
            return super().most
        return self.size(self.at_most(Limit(rank=_ANY_RANK)) - self.private_bytes)

    def ranks(self, spectra: "Sequence[Spectrum]", limit: Limit) -> tuple[int, ...]:
        """Return the ranks of residuals: of each of `matrices` those of all tasks."""
        # Triplets of what has one rank are taken together.
        tasks, parameters = range(self.tasks), self.algorithm.parameters
        weights = [abs(weight) for weight in parameters.weights(list(tasks))]

        def gain(unit: _Unit, task: int) -> Tensor:
            each = [spectra[k].squares[task] * weights[task] for k in unit.matrices]
            together = torch.zeros(max(map(len, each)), dtype=torch.float64)
            for own in each:
                together[: len(own)] += own
            return together

        if limit.rank is not None:
            found = tuple(min(limit.rank, unit.largest) for unit in self._units for _ in tasks)
        else:
            whole = (s.whole[task] * weights[task] for s in spectra for task in tasks)
            found = allocate(
                [gain(unit, task) for unit in self._units for task in tasks],
                [unit.cost for unit in self._units for _ in tasks],
                budget=limit.budget,
                goal=math.inf if limit.energy is None else limit.energy * math.fsum(whole),
                multiple=parameters.shared["rank_multiple"],
                least=[unit.least for unit in self._units for _ in tasks],
            )
        of = {k: number for number, unit in enumerate(self._units) for k in unit.matrices}
        return tuple(found[of[k] * self.tasks + task] for k in range(len(of)) for task in tasks)

    def at_most(self, limit: Limit) -> int:
        """Return the bytes of all that is stored within a rank, or at most within a share.

        A share of all triplets, the best before others, keeps that share of their squares at least.
        """
        largest = Limit(rank=limit.rank or _ANY_RANK)
        stored = Residuals(self, lambda limit: ()).within(largest).size.bytes
        least = self.least.bytes
        return stored if limit.rank else least + math.ceil((limit.energy or 1) * (stored - least))

    def rank_problems(self) -> Iterator[Problem]:
        """Yield ranks that no matrix has, and those that contradict each other."""
        shared = self.algorithm.parameters.shared
        multiple, largest = shared["rank_multiple"], shared["max_rank"]
        most = max((min(part.matrix_shape[1:]) for _, part in self.matrices), default=0)
        for name in ("rank", "max_rank", "rank_multiple"):
            given = shared[name] or 0
            if given > most:
                expected, remedy = f"at most {most}, the rank of the largest matrix", "Write less."
            elif given % multiple:
                expected, remedy = f"a multiple of `rank_multiple`, {multiple}", "Change one."
            elif name == "rank" and given > (largest or most):
                expected, remedy = f"at most `max_rank`, {largest}", "Change one."
            else:
                continue
            yield Problem(f"parameters.{name}", str(given), expected, remedy)

    def budget(self, target: Target) -> int:
        """Return the bytes that residuals may take."""
        if target.bytes is not None:
            return target.bytes - self.private_bytes - self.bare
        return math.floor((target.models or 0) * (1 + 1e-9) * self.least.unit_bytes) - self.bare


@dataclass(frozen=True)
class Spectrum:
    """Of the residuals of one tensor: (m, k) leading squared singular values, summed over stacked
    matrices, and (m,) whole squared norms.
    """

    squares: Tensor
    whole: Tensor


@dataclass(frozen=True)
class Kept:
    """What a plan keeps of one tensor of one task.

    Attributes:
        rank: of the residual; None of what has none.
        bytes: that are stored for this task alone.
        whole, left: squared norms of theta_i - theta_0, and of what is left of it.
    """

    rank: int | None
    bytes: int
    whole: float
    left: float

    @classmethod
    def of(cls, squares: Tensor, whole: float, rank: int, count: int) -> "Kept":
        """Return it of a residual with these squared singular values; `count` are its bytes."""
        return cls(rank, count, whole, max(0.0, whole - float(squares[:rank].sum())))

    @property
    def entry(self) -> dict[str, Any]:
        """What a report says of it."""
        rank = {} if self.rank is None else {"rank": self.rank}
        return {**rank, "bytes": self.bytes, "error": _relative(self.left, self.whole)}


def total(kept: Sequence[Kept]) -> dict[str, Any]:
    """Return what a report says of all of a task."""
    ranks = sorted(each.rank for each in kept if each.rank)
    left, whole = math.fsum(each.left for each in kept), math.fsum(each.whole for each in kept)
    return {
        "bytes": sum(each.bytes for each in kept),
        "ranks": [ranks[0], median_low(ranks), ranks[-1]] if ranks else [],
        "error": _relative(left, whole),
    }


def shortfall(kept: Mapping[str, Sequence[Kept]], parameters: Parameters) -> str:
    """Return a sentence if `max_rank` keeps less than the `energy` that was asked for, or ""."""
    energy, largest = parameters.shared["energy"], parameters.shared["max_rank"]
    weights = [abs(weight) for weight in parameters.weights(range(len(parameters.models)))]
    pairs = [pair for found in kept.values() for pair in zip(found, weights, strict=True)]
    left, whole = (
        math.fsum(getattr(own, what) * weight for own, weight in pairs if own.rank is not None)
        for what in ("left", "whole")
    )
    if None in (energy, largest) or left <= (1 - energy + 1e-6) * whole:
        return ""
    share = f"{1 - left / whole:.4g} of the squared norms of all residuals"
    return f"`max_rank: {largest}` keeps {share}, where `energy: {energy:g}` asks for more."


def _relative(left: float, whole: float) -> float:
    return math.sqrt(left / whole) if whole else 0.0


def kept(
    storage: ResidualStorage, plan: Plan, measured: Mapping[str, Spectrum]
) -> dict[str, list[Kept]]:
    """Return what is kept of each tensor, task by task; `measured` are the spectra of all.

    From singular values: factors are not rounded yet. Nothing is measured where all tasks are
    stored apart.
    """
    found: dict[str, list[Kept]] = {}
    for block, groups in zip(storage.layout.blocks, plan.groups, strict=True):
        apart = groups[0].kind != "residual"
        for part in block.parts:
            own = apart or part.name in groups[0].own
            found[part.name] = each = []
            for task in range(storage.tasks):
                if own:
                    dtype = storage.forced or part.dtypes[task]
                    whole = 0.0 if apart else float(measured[part.name].whole[task])
                    each.append(Kept(None, math.prod(part.shape) * dtype.itemsize, whole, 0.0))
                    continue
                rank, spectrum = groups[0].ranks[task].get(part.name, 0), measured[part.name]
                squares, whole = spectrum.squares[task], float(spectrum.whole[task])
                each.append(Kept.of(squares, whole, rank, rank * storage.cost(part)))
    return found


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
        least, most = self.storage.least.models, self.storage.most.models
        whole = [float(n) for n in range(self.storage.tasks, 0, -1) if least < n]
        reached = [n for n in whole if self.reaches(Target(models=n))]
        return [*([] if reached == whole else [most]), *reached, least]

    def plan(self, target: Target) -> Plan:
        storage = self.storage
        given = storage.algorithm.parameters.shared
        if given["rank"] is not None or given["energy"] is not None:
            return self.within(Limit(rank=given["rank"], energy=given["energy"]))
        if problem := storage.problem(target):
            raise ConfigError([problem])
        if not storage.adapted and target.holds(storage.most):
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
