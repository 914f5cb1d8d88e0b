"""Callbacks for merges and for training: one protocol, and ready ones.

They serve a merge, a plain PyTorch loop, an accelerate loop and, through `as_trainer_callback`,
transformers' Trainer. Importing this package loads neither torch nor transformers, mergekit or
peft. docs/callbacks.md lists every event.
"""

from typing import TYPE_CHECKING

from mergekit_ext.events import TRAINING_HOOKS as TRAINING_HOOKS
from mergekit_ext.events import Callback as Callback
from mergekit_ext.late import exported

if TYPE_CHECKING:
    from mergekit_ext.callbacks.checkpoints import MergeCheckpoints as MergeCheckpoints
    from mergekit_ext.callbacks.evaluate import Evaluate as Evaluate
    from mergekit_ext.callbacks.log import LogTo as LogTo
    from mergekit_ext.callbacks.snapshots import Merged as Merged
    from mergekit_ext.callbacks.trainer import as_trainer_callback as as_trainer_callback
else:
    __getattr__, _late_names = exported(
        __name__,
        {
            "checkpoints": ("MergeCheckpoints",),
            "evaluate": ("Evaluate",),
            "log": ("LogTo",),
            "snapshots": ("Merged",),
            "trainer": ("as_trainer_callback",),
        },
    )
    __all__ = ["TRAINING_HOOKS", "Callback", *_late_names()]

    def __dir__() -> list[str]:
        return __all__
