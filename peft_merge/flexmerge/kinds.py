"""FlexMerge over LoRAs, whose groups are cut to a rank that saves space, and over (IA)^3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.declared import Method
from mergekit_ext.kernels.similarity import Gram
from peft_merge.adapter import (
    Ia3Adapter,
    LoraAdapter,
    ModuleInfo,
    Update,
    VectorInfo,
    bias_changes,
    cast,
    finite_update,
    finite_updates,
    one_rank,
)
from peft_merge.algebra.core_space import CoreSpace, Rank
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.family import Changes, Family, Group
from peft_merge.io.merged import ia3_configuration, lora_configuration, stored_ranks
from peft_merge.modules import vector_changes


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
        self._r = None if plan.patterns else one_rank(infos)

    def gram(self, module: str) -> Tensor:
        """In core space; the bias of B belongs to the change."""
        updates = finite_updates(self.adapters, module)
        total = CoreSpace.of(updates, self.plan.device).gram().cpu()
        if (changes := bias_changes(updates, "cpu")) is not None:
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
        return finite_update(adapter, module).unscaled().cast(dtype, module)

    def changes(self, modules: Sequence[str], group: Group) -> Changes:
        """Fill up with zeros to the rank that is stored."""
        changes = super().changes(modules, group)
        ranks = stored_ranks({name: piece.info for name, piece in changes.items()}, self._r)
        return {
            name: replace(
                piece,
                value=piece.value.filled(ranks[name]),
                info=replace(piece.info, rank=ranks[name]),
            )
            for name, piece in changes.items()
        }

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
            changes = self.changes(modules, group)
            self._found[key] = {module: piece.info.rank for module, piece in changes.items()}
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
        return cast(adapter.load(module), dtype, module)

    def configuration(self, own: Ia3Adapter, infos: Mapping[str, VectorInfo]) -> dict[str, Any]:
        return {**own.config, **ia3_configuration(infos, [own], own.saved)}
