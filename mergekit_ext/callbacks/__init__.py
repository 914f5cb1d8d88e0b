"""Callbacks for merges and for training: one protocol, and ready ones.

They serve a merge, a plain PyTorch loop, an accelerate loop and, through `as_trainer_callback`,
transformers' Trainer. Importing this package loads neither torch nor transformers, mergekit or
peft. docs/callbacks.md lists every event.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mergekit_ext.events import TRAINING_HOOKS as TRAINING_HOOKS
from mergekit_ext.events import Callback as Callback

if TYPE_CHECKING:
    from mergekit_ext.callbacks.checkpoints import MergeCheckpoints as MergeCheckpoints
    from mergekit_ext.callbacks.evaluate import Evaluate as Evaluate
    from mergekit_ext.callbacks.log import LogTo as LogTo
    from mergekit_ext.callbacks.snapshots import Merged as Merged
    from mergekit_ext.callbacks.trainer import as_trainer_callback as as_trainer_callback

_HOMES = {
    "Evaluate": "evaluate",
    "LogTo": "log",
    "MergeCheckpoints": "checkpoints",
    "Merged": "snapshots",
    "as_trainer_callback": "trainer",
}
__all__ = sorted({"TRAINING_HOOKS", "Callback", *_HOMES})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
