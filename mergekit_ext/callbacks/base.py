"""The base model of methods that merge changes of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_ext.callbacks.kinds import Kind, kind_of_model
from mergekit_ext.callbacks.settings import INITIAL, Settings
from mergekit_ext.callbacks.state import Saved
from mergekit_ext.callbacks.store import packed, unpacked
from mergekit_ext.callbacks.weights import Weights, copied, read, require_finite, write
from mergekit_ext.errors import Problem


class Base:
    """The weights that the user gives, or those at the beginning of the training."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.weights: Weights | None = None

    def wanted(self, kind: Kind) -> bool:
        """Whether there is to be one."""
        return self._settings.base is not None or kind.needs_base

    def problems(self, kind: Kind, beginning: bool) -> Iterable[Problem]:
        """Whether the initial weights cannot be kept, or it is too late to see them."""
        if self.weights is not None or not self._initial(kind):
            return
        if self._place is not None and os.path.lexists(self._place):
            found = f"{INITIAL}, which another run may have left"
            remedy = "Choose another folder, delete it, or load the state of that run."
            yield Problem(f"where: {self._place.parent}", found, "a folder for this run", remedy)
        if not beginning:
            found = "no initial weights: training had begun"
            remedy = (
                "Call on_train_begin(0, model) before the first step, give `base=`, or load the "
                "state of the run that is resumed."
            )
            yield Problem("base", found, "the weights of the beginning", remedy)

    def keep(self, kind: Kind, weights: Weights) -> None:
        """Keep `weights` if the initial ones are wanted, or read those that were given.

        Raises:
            NonFiniteError: the base holds NaN or infinity.
        """
        if self.weights is not None or not self.wanted(kind):
            return
        base = weights if self._initial(kind) else self._given()
        require_finite(base.tensors, "base")
        self.weights = self._stored(base) if self._initial(kind) else base

    def clear(self) -> None:
        """Forget the weights, for a training that begins anew."""
        place, given = self._place, self._settings.base not in (None, INITIAL)
        own = self.weights is not None and self.weights.folder == place
        if place is not None and own and not given:
            shutil.rmtree(place, ignore_errors=True)
        self.weights = None

    def state(self) -> dict[str, Any] | None:
        """Initial weights: the path, or tensors; None for others, which are given again."""
        if self.weights is None or self._settings.base not in (None, INITIAL):
            return None
        if self._settings.folder is not None:
            return {"path": str(self.weights.folder)}
        return packed(self.weights)

    def loaded(self, state: Saved) -> Weights | None:
        """The weights that `state` stands for; what there is if it stands for none.

        Raises:
            ConfigError: it is no state of a base, or its folder cannot be read.
        """
        if state.value is None:
            return self.weights
        return read(state["path"].text()) if "path" in state.fields() else unpacked(state)

    @property
    def _place(self) -> Path | None:
        """Where initial weights are kept; None for memory."""
        folder = self._settings.folder
        return None if folder is None else folder.resolve() / INITIAL

    def _initial(self, kind: Kind) -> bool:
        given = self._settings.base
        return kind.needs_base if given is None else isinstance(given, str) and given == INITIAL

    def _stored(self, weights: Weights) -> Weights:
        if self._place is None:
            return copied(weights)
        write(weights, self._place)
        return read(self._place)

    def _given(self) -> Weights:
        given = self._settings.base
        if isinstance(given, (str, os.PathLike)):
            return read(given)
        if isinstance(given, Mapping):
            return Weights(given)
        return copied(kind_of_model(given, self._settings).view(given))
