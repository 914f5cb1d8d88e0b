"""FlexMerge over (IA)^3: vectors around 1, or their logarithms."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from mergekit_ext.kernels.similarity import Gram
from mergekit_ext.methods import Method
from peft_merge import ia3
from peft_merge.adapter import Ia3Adapter, VectorInfo
from peft_merge.coefficients import coefficients, ia3_norms
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge.family import Group, Piece, settings_of
from peft_merge.flexmerge.private import cast_to, private
from peft_merge.io.merged import ia3_configuration

VectorPiece = Piece[Tensor, VectorInfo]


class Ia3Family:
    """See `flexmerge.family.Family`."""

    def __init__(self, plan: MergePlan, rule: Method):
        """Raises `ConfigError` and `NonFiniteError` as `ia3.check` does."""
        self._plan, self._rule = plan, rule
        self._adapters = [a for a in plan.adapters if isinstance(a, Ia3Adapter)]
        self._forced = plan.dtype if plan.request.dtype is not None else None
        self._space = cast(ia3.Space, plan.space)
        ia3.check(self._adapters, self._space)

    @property
    def small(self) -> bool:
        """Vectors are."""
        return True

    def gram(self, module: str) -> Tensor:
        """Of the changes that the rule sees: l - 1, or log l."""
        gram = Gram(len(self._adapters))
        gram.add(ia3.changes(self._adapters, module, space=self._space))
        return gram.value

    def bytes(self, modules: Sequence[str], group: Group) -> int:
        """Of one vector for each module that one of the tasks has."""
        total = 0
        for module in modules:
            own = [a.infos[module] for a in self._of(group) if module in a.infos]
            if own:
                dtype = reduce(torch.promote_types, (info.dtype for info in own))
                total += math.prod(own[0].shape) * (self._forced or dtype).itemsize
        return total

    def merge(self, modules: Sequence[str], group: Group) -> dict[str, VectorPiece]:
        """By the rule; an adapter without the module counts as the identity."""
        pieces: dict[str, VectorPiece] = {}
        for module in modules:
            views = [_view(adapter, module) for adapter in self._of(group)]
            if not any(view.infos for view in views):
                continue
            found = None
            if self._rule.nan:
                found = coefficients(ia3_norms(views, space=self._space))[module]
            settings = settings_of(self._plan, self._rule, module, group, found)
            vectors, infos, report = ia3.merge_ia3(
                views,
                self._rule,
                lambda _, settings=settings: settings,  # type: ignore[misc]
                space=self._space,
                dtype=self._forced,
                device=self._plan.device,
                seed=self._plan.seed,
            )
            pieces[module] = Piece(vectors[module].cpu(), infos[module], report[module])
        return pieces

    def own(self, modules: Sequence[str], task: int) -> dict[str, VectorPiece]:
        """The vectors as they are, in `dtype` if one is asked for."""
        adapter = self._adapters[task]
        found = {}
        for module in modules:
            if module in adapter.infos:
                dtype = self._forced or adapter.infos[module].dtype
                vector = cast_to(adapter.load(module), dtype, module)
                found[module] = Piece(vector, replace(adapter.infos[module], dtype=dtype))
        return found

    def adapter(
        self, task: int, pieces: Mapping[str, VectorPiece], shared: Collection[str]
    ) -> Ia3Adapter:
        """With its own configuration, but for modules that only others had."""
        own = self._adapters[task]
        infos = {module: piece.info for module, piece in pieces.items()}
        config = dict(own.config)
        if shared:
            config |= ia3_configuration(infos, [own], own.saved)
        if self._plan.request.base_model is not None:
            config["base_model_name_or_path"] = self._plan.request.base_model
        return Ia3Adapter(
            own.name,
            config,
            infos,
            lambda module: pieces[module].value,
            private(own, self._forced),
        )

    def _of(self, group: Group) -> list[Ia3Adapter]:
        return [self._adapters[task] for task in group]


def _view(adapter: Ia3Adapter, module: str) -> Ia3Adapter:
    """The adapter as if it had this module only."""
    infos = {module: adapter.infos[module]} if module in adapter.infos else {}
    return replace(adapter, infos=infos, saved={})
