"""A callback of this project as a callback of transformers' Trainer."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

from mergekit_ext.callbacks.protocol import require_training_callback
from mergekit_ext.errors import MergeWarning

# On a Trainer's control object, which its callbacks share: the files of their states.
_FILES = "_callback_state_files"


def as_trainer_callback(callback: Any) -> Any:
    """A ``transformers.TrainerCallback`` that calls `callback` while a Trainer trains.

    The callback gets ``state.global_step`` as the step, and `on_log` in the main process only. Its
    state, if it has any, is saved in each checkpoint as ``callback_<class>.pt`` (with a number for
    a second one of its class) and taken over when the Trainer resumes from a checkpoint in its
    output folder.

    Args:
        callback: an object with some of the methods in `TRAINING_HOOKS`.

    Raises:
        TypeError: it has none of them, or is a class.
    """
    from transformers import TrainerCallback

    require_training_callback(callback)

    class Adapter(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Hands on what a Trainer tells."""

        def __init__(self) -> None:
            self.callback = callback
            self.file = ""

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.file = self.file or _free(type(callback).__name__, control)
            vars(control).setdefault(_FILES, set()).add(self.file)
            if state.global_step:
                _resume(callback, _folder(args, state) / self.file)
            _call(callback, "on_train_begin", state.global_step, others["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            _call(callback, "on_step_end", state.global_step, others["model"])

        def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.is_world_process_zero:
                _call(callback, "on_log", state.global_step, others.get("logs") or {})

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            folder = _folder(args, state)
            _call(callback, "on_save", state.global_step, folder)
            if state.is_world_process_zero:
                _save(callback, folder / self.file)

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            _call(callback, "on_train_end", state.global_step, others["model"])

    return Adapter()


def _call(callback: Any, hook: str, *arguments: Any) -> None:
    method = getattr(callback, hook, None)
    if method is not None:
        method(*arguments)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _free(name: str, control: Any) -> str:
    """The file for the state of the next callback of a class: the order decides."""
    taken = vars(control).get(_FILES, set())
    names = (f"callback_{name}{'' if i == 1 else f'_{i}'}.pt" for i in itertools.count(1))
    return next(file for file in names if file not in taken)


def _save(callback: Any, file: Path) -> None:
    import torch

    state = callback.state_dict() if hasattr(callback, "state_dict") else None
    if state and file.parent.is_dir():
        torch.save(state, file)


def _resume(callback: Any, file: Path) -> None:
    import torch

    if not hasattr(callback, "load_state_dict"):
        return
    if file.is_file():
        # Numbers, texts and tensors only: a checkpoint may come from somebody else.
        callback.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    elif hasattr(callback, "state_dict") and callback.state_dict():
        warnings.warn(
            MergeWarning(
                f"{type(callback).__name__}: there is no {file}, so it goes on without what it had "
                "before the checkpoint. Resume from a checkpoint in the output folder."
            ),
            stacklevel=2,
        )
