"""FlexMerge over (IA)^3: vectors around 1, or their logarithms."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from mergekit_ext.kernels.similarity import Gram
from peft_merge.adapter import Ia3Adapter, VectorInfo
from peft_merge.flexmerge.family import Family, Group, cast_to
from peft_merge.io.merged import ia3_configuration
from peft_merge.modules import Piece, vector_changes

VectorPiece = Piece[Tensor, VectorInfo]


class Ia3Family(Family):
    """(IA)^3 adapters."""

    @property
    def small(self) -> bool:
        """Vectors are."""
        return True

    def gram(self, module: str) -> Tensor:
        """See `Family.gram`; of the changes that the rule sees: l - 1, or log l."""
        gram = Gram(len(self.adapters))
        changes = vector_changes(self.adapters, module, self.plan.space)
        gram.add([change.flatten() for change in changes])
        return gram.value

    def bytes(self, modules: Sequence[str], group: Group) -> int:
        """See `Family.bytes`; of one vector for each module that one of the tasks has."""
        total = 0
        for module in modules:
            if own := self.infos(module, group):
                dtype = self.forced or reduce(torch.promote_types, (info.dtype for info in own))
                total += math.prod(own[0].shape) * dtype.itemsize
        return total

    def merge(self, modules: Sequence[str], group: Group) -> dict[str, VectorPiece]:
        """See `Family.merge`; an adapter without the module counts as the identity."""
        return {name: self._merged(name, group) for name in modules if self.infos(name, group)}

    def own(self, modules: Sequence[str], task: int) -> dict[str, VectorPiece]:
        """See `Family.own`: the vectors as they are, in `dtype` if one is asked for."""
        adapter = self.adapters[task]
        found = {}
        for module in modules:
            if module in adapter.infos:
                dtype = self.forced or adapter.infos[module].dtype
                vector = cast_to(adapter.load(module), dtype, module)
                found[module] = Piece(vector, replace(adapter.infos[module], dtype=dtype))
        return found

    def adapter(
        self, task: int, pieces: Mapping[str, VectorPiece], shared: Collection[str]
    ) -> Ia3Adapter:
        """See `Family.adapter`; it has its own configuration, but for modules of others."""
        own = self.adapters[task]
        infos = {module: piece.info for module, piece in pieces.items()}
        config = dict(own.config)
        if shared:
            config |= ia3_configuration(infos, [own], own.saved)
        if self.plan.base_model is not None:
            config["base_model_name_or_path"] = self.plan.base_model
        values = {module: piece.value for module, piece in pieces.items()}
        return Ia3Adapter(own.name, config, infos, values.__getitem__, self.private(task))

    def _merged(self, module: str, group: Group) -> VectorPiece:
        piece = self.merged(module, group)
        return replace(piece, value=piece.value.cpu())
