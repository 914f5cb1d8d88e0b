"""The protocol: events of a merge (`mergekit_ext.events`) and of a training."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from mergekit_ext.events import MERGE_HOOKS, MergeCallback, require_hooks

TRAINING_HOOKS: tuple[str, ...] = (
    "on_train_begin",
    "on_step_end",
    "on_log",
    "on_save",
    "on_train_end",
)


class Callback(MergeCallback):
    """Base class of callbacks for merges and training: override what you need.

    A callback need not inherit from it: any object with some of the methods will do. In a plain
    loop you call them yourself; in a run of several processes, in each of them.
    """

    def on_train_begin(self, step: int, model: Any) -> None:
        """Before the first step; `step` is 0, or that of the checkpoint that is resumed."""

    def on_step_end(self, step: int, model: Any) -> None:
        """The optimizer has made its `step`-th step (counted from 1) on `model`."""

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """The loop has something to log: losses, learning rates, by name."""

    def on_save(self, step: int, path: str | os.PathLike[str]) -> None:
        """A checkpoint stands complete in the folder `path`."""

    def on_train_end(self, step: int, model: Any) -> None:
        """Training is over; `step` steps were made."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, lists, mappings and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned in an earlier run."""


def require_training_callback(callback: object) -> None:
    """Refuse what cannot be called while training.

    Raises:
        TypeError: `callback` is a class, has none of the methods in `TRAINING_HOOKS`, or one that
            does not take its arguments.
    """
    hooks = {
        hook: tuple(inspect.signature(getattr(Callback, hook)).parameters)[1:]
        for hook in TRAINING_HOOKS
    }
    merges = any(hasattr(callback, hook) for hook in MERGE_HOOKS)
    only = ", which only listens to merges" if merges else ""
    require_hooks(callback, hooks, "callback", only)
