"""FlexMerge over LoRAs: inner products in core space, groups cut to a rank that saves space."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from mergekit_ext.methods import Method
from peft_merge.adapter import LoraAdapter, ModuleInfo, Update, finite_update, one_rank
from peft_merge.algebra.core_space import CoreSpace
from peft_merge.algebra.truncated import Rank
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.family import Family, Group, cast_to
from peft_merge.io.merged import lora_configuration, stored_ranks
from peft_merge.modules import Piece, small

UpdatePiece = Piece[Update, ModuleInfo]


class LoraFamily(Family):
    """LoRAs.

    All adapters have one rank in all modules, the largest of the inputs, and alpha equals it: so
    every reader scales them alike, and PEFT's hot swap works between them. A group's change is the
    best approximation of that rank.

    With patterns every module has the rank of its own, and a group's change by default the largest
    rank among its members there. A number is the rank of every merged change; with "lossless" or an
    energy the ranks are found by merging.
    """

    def __init__(self, plan: MergePlan, rule: Method):
        super().__init__(plan, rule)
        self._found: dict[tuple[tuple[str, ...], Group], dict[str, int]] = {}
        infos = (info for adapter in self.adapters for info in adapter.infos.values())
        self._r = None if plan.patterns else one_rank(infos)

    @property
    def small(self) -> bool:
        """See `peft_merge.modules.small`."""
        return small(self.adapters, self.rule, self.plan.resolve, self.plan.space)

    def gram(self, module: str) -> Tensor:
        """See `Family.gram`; in core space, the bias of B belongs to the change."""
        updates = [finite_update(a, module) if module in a.infos else None for a in self.adapters]
        shape = self.infos(module, range(len(updates)))[0].shape
        total = CoreSpace.of(updates, self.plan.device).gram().cpu()
        if any(update is not None and update.bias is not None for update in updates):
            biases = torch.stack([_bias(update, shape[0] * shape[1]) for update in updates])
            total = total + biases @ biases.T
        return (total + total.T) / 2

    def bytes(self, modules: Sequence[str], group: Group) -> int:
        """See `Family.bytes`; of both factors and the bias."""
        total = 0
        for module, rank in self._ranks(modules, group).items():
            infos = self.infos(module, group)
            n, rows, columns = infos[0].shape
            bias = n * rows if any(info.bias for info in infos) else 0
            dtype = self.forced or reduce(torch.promote_types, (info.dtype for info in infos))
            total += (n * rank * (rows + columns) + bias) * dtype.itemsize
        return total

    def merge(self, modules: Sequence[str], group: Group) -> dict[str, UpdatePiece]:
        """See `Family.merge`; an adapter without the module counts as no change."""
        return self._filled(
            {name: self._merged(name, group) for name in modules if self.infos(name, group)}
        )

    def own(self, modules: Sequence[str], task: int) -> dict[str, UpdatePiece]:
        """See `Family.own`: the factors with the scaling in B, in `dtype` if one is asked for."""
        adapter = self.adapters[task]
        found = {}
        for module in modules:
            if module in adapter.infos:
                info = adapter.infos[module]
                update = finite_update(adapter, module)
                dtype = self.forced or info.dtype
                value = _cast(update.unscaled(), dtype, module)
                found[module] = Piece(value, replace(info, dtype=dtype))
        return self._filled(found)

    def adapter(
        self, task: int, pieces: Mapping[str, UpdatePiece], shared: Collection[str]
    ) -> LoraAdapter:
        """See `Family.adapter`; its scaling is 1 in all modules."""
        own = self.adapters[task]
        infos = {module: piece.info for module, piece in pieces.items()}
        config = lora_configuration(infos, [own], own.saved)
        common = lora_configuration(infos, self.adapters, ())
        parameters = any(info.layout == "parameter" for info in infos.values())
        config["lora_dropout"] = common["lora_dropout"]
        config["target_parameters"] = common["target_parameters"] if parameters else None
        if self.plan.base_model is not None:
            config["base_model_name_or_path"] = self.plan.base_model
        values = {module: piece.value for module, piece in pieces.items()}
        return LoraAdapter(own.name, config, infos, values.__getitem__, self.private(task))

    def _ranks(self, modules: Sequence[str], group: Group) -> dict[str, int]:
        """Return those of the group's changes, from headers where that is possible."""
        if len(group) == 1 or self.plan.rank is None or isinstance(self.plan.rank, int):
            known = {name: infos for name in modules if (infos := self.infos(name, group))}
            alone = len(group) == 1
            needed = {
                name: replace(i[0], rank=i[0].rank if alone else self._rank(name, group))
                for name, i in known.items()
            }
            return stored_ranks(needed, self._r)
        key = (tuple(modules), group)
        if key not in self._found:
            pieces = self.merge(modules, group)
            self._found[key] = {module: piece.info.rank for module, piece in pieces.items()}
        return self._found[key]

    def _filled(self, pieces: Mapping[str, UpdatePiece]) -> dict[str, UpdatePiece]:
        """Return pieces with zeros up to the rank that is stored, which change nothing."""
        ranks = stored_ranks({name: piece.info for name, piece in pieces.items()}, self._r)
        return {
            name: replace(
                piece,
                value=piece.value.filled(ranks[name]),
                info=replace(piece.info, rank=ranks[name]),
            )
            for name, piece in pieces.items()
        }

    def _rank(self, module: str, group: Group) -> int:
        infos = self.infos(module, group)
        rank = self.plan.rank
        if self._r is not None:
            rank = self._r // infos[0].groups
        elif not isinstance(rank, int):
            rank = max(info.rank for info in infos)
        return min(rank, infos[0].rows, infos[0].columns)

    def _merged(self, module: str, group: Group) -> UpdatePiece:
        rank: Rank | None = self.plan.rank
        if rank is None or isinstance(rank, int):
            rank = self._rank(module, group)
        piece = self.merged(module, group, rank=rank)
        return replace(piece, value=_cast(piece.value, piece.info.dtype, module))


def _cast(update: Update, dtype: torch.dtype, module: str) -> Update:
    return replace(
        update,
        a=cast_to(update.a, dtype, module),
        b=cast_to(update.b, dtype, module),
        bias=None if update.bias is None else cast_to(update.bias, dtype, module),
    )


def _bias(update: Update | None, length: int) -> Tensor:
    """Return the change of the output's bias."""
    if update is None or update.bias is None:
        return torch.zeros(length, dtype=torch.float64)
    return update.scale * update.bias.to("cpu", torch.float64)
