"""What FlexMerge needs to know of a kind of adapter: blocks, similarities, bytes, merges.

The groups of LoRAs are cut to a rank that saves space.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.declared import Method
from mergekit_ext.declared.nan import inverse_norm_coefficients
from mergekit_ext.flexmerge.storage import GroupStorage, Size, Target
from mergekit_ext.flexmerge.stored import StoredGroup
from mergekit_ext.kernels.similarity import Gram
from peft_merge import adapter as data
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.algebra.core_space import CoreSpace, Rank
from peft_merge.coefficients import change_norms
from peft_merge.config.plan import MergePlan
from peft_merge.io import names
from peft_merge.io.merged import ia3_configuration, lora_configuration, stored_ranks
from peft_merge.modules import Piece, merge_module, vector_changes
from peft_merge.saved import merge_saved

Group = tuple[int, ...]
# Of modules, by their names.
Changes = dict[str, Piece]


@dataclass(frozen=True)
class Block:
    """Modules whose groups of tasks are the same."""

    name: str
    modules: tuple[str, ...]


def _layer(module: str, adapted: Collection[str]) -> str:
    owner = names.owner(module, adapted)
    match = names.LAYER.search(owner)
    return owner[: match.end(1)] if match else owner


# PEFT configures some modules together (both projections of torch's attention, the target
# parameters of one module): they have one rank, so they are never apart.
GRANULARITIES: dict[str, Callable[[str, Collection[str]], str]]
GRANULARITIES = {"module": names.owner, "layer": _layer}


def blocks_of(modules: Collection[str], granularity: str) -> tuple[Block, ...]:
    """Return the blocks in natural order of their names (`layers.2` before `layers.10`).

    By `layer`, those of a name up to its first number; modules outside of layers by themselves.
    """
    key = GRANULARITIES[granularity]
    found: dict[str, list[str]] = {}
    for module in sorted(modules, key=_natural):
        found.setdefault(key(module, modules), []).append(module)
    return tuple(Block(name, tuple(found[name])) for name in sorted(found, key=_natural))


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class Family(GroupStorage):
    """The adapters of one kind, and what groups of them store. Tasks are named by their index.

    Whole tensors are private, those of the base for all. Inner products and changes may be asked
    for by several threads. `rule` merges the members of a group.
    """

    what = "adapters"

    def __init__(self, plan: MergePlan, rule: Method, granularity: str):
        self.plan, self.rule = plan, rule
        self.adapters: Sequence[Any] = plan.adapters
        self.layout = blocks_of(plan.modules, granularity)
        common = of_the_base(self.adapters)
        private = sum(
            tensor().nbytes
            for task in range(len(self.adapters))
            for name, tensor in self._private(task).items()
            if task == 0 or name not in common
        )
        super().__init__(len(self.layout), len(self.adapters), private)

    @abstractmethod
    def gram(self, module: str) -> Tensor:
        """Return inner products of the m changes of a module: (m, m), float64, symmetric."""

    @abstractmethod
    def elements(self, modules: Sequence[str], group: Group) -> dict[str, int]:
        """Return how many numbers a group stores of each module that one of its tasks has."""

    @abstractmethod
    def own(self, module: str, adapter: Any, dtype: torch.dtype) -> Any:
        """Return an adapter's change in its stored values, cast to `dtype`."""

    @abstractmethod
    def configuration(self, own: Any, infos: Mapping[str, Any]) -> dict[str, Any]:
        """Return that of the output of the task `own`."""

    def bytes(self, block: int, groups: Sequence[StoredGroup]) -> int:
        return sum(self._bytes(self.layout[block], group.tasks) for group in groups)

    @property
    def least(self) -> Size:
        """However tasks share a block, it is as large as the largest of their own changes, cut to
        the rank of what is shared."""
        tasks, each = range(self.tasks), self._bytes
        own = (max(min(each(b, (t,)), each(b, (t, t))) for t in tasks) for b in self.layout)
        return self.size(sum(own))

    def advice(self, target: Target) -> str:
        return "A smaller `rank` for what LoRAs share (with `patterns: true`) makes less possible."

    def changes(self, modules: Sequence[str], group: Group) -> Changes:
        """Return what the tasks of a group have of a block: one's own changes, or merged ones."""
        present = [module for module in modules if self.infos(module, group)]
        if len(group) > 1:
            return {module: self.merge(module, group) for module in present}
        adapter, found = self.adapters[group[0]], {}
        for module in present:
            info = adapter.infos[module]
            info = replace(info, dtype=self.plan.forced or info.dtype)
            found[module] = Piece(self.own(module, adapter, info.dtype), info)
        return found

    def adapter(self, task: int, changes: Changes) -> Adapter:
        """Return a task's adapter with these changes."""
        own = self.adapters[task]
        infos = {module: piece.info for module, piece in changes.items()}
        made: Adapter = replace(
            own,
            config=self.configuration(own, infos),
            infos=infos,
            load={module: piece.value for module, piece in changes.items()}.__getitem__,
            saved=self._private(task),
        )
        return made

    def infos(self, module: str, group: Sequence[int]) -> list[Any]:
        """Return what is known of a module in the adapters that have it."""
        adapters = (self.adapters[task] for task in group)
        return [adapter.infos[module] for adapter in adapters if module in adapter.infos]

    def merge(self, module: str, group: Group) -> Piece:
        """Return `merge_module` of a group, NAN's coefficients being those of the group."""
        members = tuple(self.adapters[task] for task in group)
        plan, values = self.plan, self.plan.resolve(module)
        weights = [values.weights[task] for task in group]
        settings = replace(values, weights=weights, each=[values.each[task] for task in group])
        if self.rule.nan:
            norms = change_norms(members, module, space=plan.space)
            settings = settings.scaled(inverse_norm_coefficients(norms))
        rank = self.rank(module, group)
        part: Any = replace(plan, adapters=members, rank=rank, dtype=plan.forced)
        return merge_module(part, module, self.rule, settings)

    def rank(self, module: str, group: Group) -> Rank | None:
        """Return that of a merged change; vectors have none."""
        return None

    def _bytes(self, block: Block, group: Group) -> int:
        total = 0
        for module, count in self.elements(block.modules, group).items():
            dtypes = (info.dtype for info in self.infos(module, group))
            total += count * (self.plan.forced or reduce(torch.promote_types, dtypes)).itemsize
        return total

    def _private(self, task: int) -> dict[str, Callable[[], Tensor]]:
        own = self.adapters[task]
        return {n: partial(merge_saved, n, [own], [1.0], self.plan.forced) for n in own.saved}


class LoraFamily(Family):
    """LoRAs.

    All adapters have one rank in all modules, the largest of the inputs, and alpha equals it: so
    every reader scales them alike, and PEFT's hot swap works between them. A group's change is the
    best approximation of that rank.

    With patterns every module has the rank of its own, and a group's change by default the largest
    rank among its members there. A number is the rank of every merged change; with "lossless" or an
    energy the ranks are found by merging.
    """

    def __init__(self, plan: MergePlan, rule: Method, granularity: str):
        super().__init__(plan, rule, granularity)
        self._found: dict[tuple[tuple[str, ...], Group], dict[str, int]] = {}
        infos = (info for adapter in self.adapters for info in adapter.infos.values())
        self._r = None if plan.patterns else data.one_rank(infos)

    def gram(self, module: str) -> Tensor:
        """In core space; the bias of B belongs to the change."""
        updates = data.finite_updates(self.adapters, module)
        total = CoreSpace.of(updates, self.plan.device).gram().cpu()
        if (changes := data.bias_changes(updates, "cpu")) is not None:
            biases = torch.stack(changes)
            total = total + biases @ biases.T
        return (total + total.T) / 2

    def elements(self, modules: Sequence[str], group: Group) -> dict[str, int]:
        found = {}
        for module, rank in self._ranks(modules, group).items():
            infos = self.infos(module, group)
            n, rows, _ = infos[0].shape
            bias = n * rows if any(info.bias for info in infos) else 0
            found[module] = rank * infos[0].numbers + bias
        return found

    def own(self, module: str, adapter: LoraAdapter, dtype: torch.dtype) -> Update:
        """Return the factors with the scaling in B."""
        return data.finite_update(adapter, module).unscaled().cast(dtype, module)

    def changes(self, modules: Sequence[str], group: Group) -> Changes:
        """Fill up with zeros to the rank that is stored."""
        changes = super().changes(modules, group)
        ranks = stored_ranks({name: piece.info for name, piece in changes.items()}, self._r)
        for name, piece in changes.items():
            info = replace(piece.info, rank=ranks[name])
            changes[name] = replace(piece, value=piece.value.filled(info.rank), info=info)
        return changes

    def configuration(self, own: LoraAdapter, infos: Mapping[str, ModuleInfo]) -> dict[str, Any]:
        config = lora_configuration(infos, [own], own.saved)
        common = lora_configuration(infos, self.adapters, ())
        parameters = any(info.layout == "parameter" for info in infos.values())
        config["lora_dropout"] = common["lora_dropout"]
        config["target_parameters"] = common["target_parameters"] if parameters else None
        return config

    def _ranks(self, modules: Sequence[str], group: Group) -> dict[str, int]:
        """From headers where that is possible."""
        needed = {}
        for module in modules:
            if infos := self.infos(module, group):
                rank = infos[0].rank if len(group) == 1 else self.rank(module, group)
                needed[module] = replace(infos[0], rank=rank)
        if all(isinstance(info.rank, int) for info in needed.values()):
            return stored_ranks(needed, self._r)
        key = (tuple(modules), group)
        if key not in self._found:
            self._found[key] = {m: p.info.rank for m, p in self.changes(modules, group).items()}
        return self._found[key]

    def rank(self, module: str, group: Group) -> Rank:
        infos = self.infos(module, group)
        rank = self.plan.rank
        if self._r is not None:
            rank = self._r // infos[0].groups
        elif rank is None:
            rank = max(info.rank for info in infos)
        return min(rank, infos[0].largest_rank) if isinstance(rank, int) else rank


class Ia3Family(Family):
    """(IA)^3 adapters: vectors around 1, or their logarithms."""

    def gram(self, module: str) -> Tensor:
        """Of the changes that the rule sees: l - 1, or log l."""
        gram = Gram(self.tasks)
        changes = vector_changes(self.adapters, module, self.plan.space)
        gram.add([change.flatten() for change in changes])
        return gram.value

    def elements(self, modules: Sequence[str], group: Group) -> dict[str, int]:
        known = {module: self.infos(module, group) for module in modules}
        return {module: math.prod(infos[0].shape) for module, infos in known.items() if infos}

    def own(self, module: str, adapter: Ia3Adapter, dtype: torch.dtype) -> Tensor:
        return data.cast(adapter.load(module), dtype, module)

    def configuration(self, own: Ia3Adapter, infos: Mapping[str, VectorInfo]) -> dict[str, Any]:
        return {**own.config, **ia3_configuration(infos, [own], own.saved)}


def of_the_base(adapters: Sequence[Adapter]) -> set[str]:
    """Return the whole tensors that all adapters carry with equal values beside `modules_to_save`.

    PEFT saves embeddings along when they are adapted. They replace the base's own, for all tasks.
    """
    first, *others = adapters
    return {
        name
        for name in first.saved
        if names.module_to_save(name, first.config) is None
        and all(name in other.saved for other in others)
        and all(torch.equal(first.saved[name](), other.saved[name]()) for other in others)
    }
