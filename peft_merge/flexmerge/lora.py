"""FlexMerge over LoRAs: inner products in core space, groups cut to a rank that saves space."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from peft_merge.adapter import LoraAdapter, ModuleInfo, Update
from peft_merge.config.plan import MergePlan
from peft_merge.core_space import CoreSpace
from peft_merge.flexmerge.configuration import task_configuration
from peft_merge.flexmerge.family import Group, Piece, settings_of
from peft_merge.flexmerge.private import cast_to, private
from peft_merge.io import names
from peft_merge.lora import merge_lora, small
from peft_merge.ranks import Rank, padded
from peft_merge.rules.base import Rule
from peft_merge.statistics import coefficients, finite, lora_norms

UpdatePiece = Piece[Update, ModuleInfo]


class LoraFamily:
    """See `flexmerge.family.Family`.

    A group's change has by default the largest rank among its members there, the best
    approximation of that rank: what two adapters share takes the room of one. A number is the rank
    of every merged change; with "lossless" or an energy the ranks are found by merging.
    """

    def __init__(self, plan: MergePlan, rule: Rule):
        self._plan, self._rule = plan, rule
        self._adapters = [a for a in plan.adapters if isinstance(a, LoraAdapter)]
        self._forced = plan.dtype if plan.request.dtype is not None else None
        self._found: dict[tuple[tuple[str, ...], Group], dict[str, int]] = {}

    @property
    def small(self) -> bool:
        """See `peft_merge.lora.small`."""
        return small(self._adapters, self._rule, self._plan.resolve, self._plan.space)

    def gram(self, module: str) -> Tensor:
        """In core space; the bias of B belongs to the change."""
        updates = [
            finite(a.load(module), module, a.name) if module in a.infos else None
            for a in self._adapters
        ]
        shape = self._infos(module, range(len(self._adapters)))[0].shape
        total = CoreSpace.of(updates, shape, self._plan.device).gram().cpu()
        if any(update is not None and update.bias is not None for update in updates):
            biases = torch.stack([_bias(update, shape[0] * shape[1]) for update in updates])
            total = total + biases @ biases.T
        return (total + total.T) / 2

    def bytes(self, modules: Sequence[str], group: Group) -> int:
        """Of both factors and the bias, of each module that one of the tasks has."""
        ranks = None if len(group) == 1 else self._ranks(modules, group)
        total = 0
        for module in modules:
            infos = self._infos(module, group)
            if infos:
                rank = infos[0].rank if ranks is None else ranks[module]
                total += _elements(infos, rank) * self._dtype(infos).itemsize
        return total

    def merge(self, modules: Sequence[str], group: Group) -> dict[str, UpdatePiece]:
        """By the rule; an adapter without the module counts as no change."""
        pieces = {
            module: self._merged(module, group) for module in modules if self._infos(module, group)
        }
        ranks = _equal({module: piece.info.rank for module, piece in pieces.items()})
        return {module: _filled(piece, ranks[module]) for module, piece in pieces.items()}

    def own(self, modules: Sequence[str], task: int) -> dict[str, UpdatePiece]:
        """The factors as they are, in `dtype` if one is asked for."""
        adapter = self._adapters[task]
        found = {}
        for module in modules:
            if module in adapter.infos:
                info = adapter.infos[module]
                update = finite(adapter.load(module), module, adapter.name)
                dtype = self._forced or info.dtype
                found[module] = Piece(_cast(update, dtype, module), replace(info, dtype=dtype))
        return found

    def adapter(
        self, task: int, pieces: Mapping[str, UpdatePiece], shared: Collection[str]
    ) -> LoraAdapter:
        """With its own ranks and scalings, save for what is shared: that has a scaling of 1."""
        own = self._adapters[task]
        infos = {module: piece.info for module, piece in pieces.items()}
        scales = {module: piece.value.scale for module, piece in pieces.items()}
        config = dict(own.config)
        if shared:
            config = task_configuration(infos, scales, shared, own, self._adapters)
        if self._plan.request.base_model is not None:
            config["base_model_name_or_path"] = self._plan.request.base_model
        return LoraAdapter(
            own.name,
            config,
            infos,
            lambda module: pieces[module].value,
            private(own, self._forced),
        )

    def _infos(self, module: str, group: Sequence[int]) -> list[ModuleInfo]:
        adapters = (self._adapters[task] for task in group)
        return [adapter.infos[module] for adapter in adapters if module in adapter.infos]

    def _dtype(self, infos: Sequence[ModuleInfo]) -> torch.dtype:
        return self._forced or reduce(torch.promote_types, (info.dtype for info in infos))

    def _ranks(self, modules: Sequence[str], group: Group) -> dict[str, int]:
        """Of the group's changes, from headers where that is possible."""
        present = [module for module in modules if self._infos(module, group)]
        if self._plan.rank is None or isinstance(self._plan.rank, int):
            return _equal({module: self._rank(module, group) for module in present})
        key = (tuple(modules), group)
        if key not in self._found:
            pieces = self.merge(modules, group)
            self._found[key] = {module: piece.info.rank for module, piece in pieces.items()}
        return self._found[key]

    def _rank(self, module: str, group: Group) -> int:
        infos = self._infos(module, group)
        wanted = self._plan.rank
        rank = wanted if isinstance(wanted, int) else max(info.rank for info in infos)
        return min(rank, infos[0].rows, infos[0].columns)

    def _merged(self, module: str, group: Group) -> UpdatePiece:
        views = [_view(self._adapters[task], module) for task in group]
        found = None
        if self._rule.coefficients is not None:
            found = coefficients(lora_norms(views))[module]
        settings = settings_of(self._plan, self._rule, module, group, found)
        rank: Rank | None = self._plan.rank
        if rank is None or isinstance(rank, int):
            rank = self._rank(module, group)
        updates, infos, report = merge_lora(
            views,
            self._rule,
            lambda _: settings,
            space=self._plan.space,
            rank=rank,
            dtype=self._forced,
            device=self._plan.device,
            seed=self._plan.seed,
        )
        update = _cast(updates[module], infos[module].dtype, module)
        return Piece(update, infos[module], report[module])


def _view(adapter: LoraAdapter, module: str) -> LoraAdapter:
    """The adapter as if it had this module only."""
    infos = {module: adapter.infos[module]} if module in adapter.infos else {}
    return replace(adapter, infos=infos, saved={})


def _elements(infos: Sequence[ModuleInfo], rank: int) -> int:
    n, rows, columns = infos[0].shape
    bias = n * rows if any(info.bias for info in infos) else 0
    return n * rank * (rows + columns) + bias


def _equal(ranks: Mapping[str, int]) -> dict[str, int]:
    """The same for modules that PEFT configures together: the largest."""
    largest: dict[str, int] = {}
    for module, rank in ranks.items():
        owner = names.owner(module, ranks)
        largest[owner] = max(largest.get(owner, 1), rank)
    return {module: largest[names.owner(module, ranks)] for module in ranks}


def _filled(piece: UpdatePiece, rank: int) -> UpdatePiece:
    """With zeros up to a rank, which change nothing."""
    value = replace(
        piece.value, a=padded(piece.value.a, rank, -2), b=padded(piece.value.b, rank, -1)
    )
    return replace(piece, value=value, info=replace(piece.info, rank=rank))


def _cast(update: Update, dtype: torch.dtype, module: str) -> Update:
    return replace(
        update,
        a=cast_to(update.a, dtype, module),
        b=cast_to(update.b, dtype, module),
        bias=None if update.bias is None else cast_to(update.bias, dtype, module),
    )


def _bias(update: Update | None, length: int) -> Tensor:
    """The change of the output's bias."""
    if update is None or update.bias is None:
        return torch.zeros(length, dtype=torch.float64)
    return update.scale * update.bias.to("cpu", torch.float64)
