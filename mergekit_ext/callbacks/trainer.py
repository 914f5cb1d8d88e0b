"""A callback of this project as a callback of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_ext.callbacks.protocol import require_training_callback

STATE = "callback_{}.pt"


def as_trainer_callback(callback: Any) -> Any:
    """A ``transformers.TrainerCallback`` that calls `callback` while a Trainer trains.

    The callback gets ``state.global_step`` as the step. Its state, if it has any, is saved in each
    checkpoint as ``callback_<class>.pt`` and taken over when the Trainer resumes from a checkpoint
    in its output folder.

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

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step:
                _resume(callback, _folder(args, state))
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
                _save(callback, folder)

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            _call(callback, "on_train_end", state.global_step, others["model"])

    return Adapter()


def _call(callback: Any, hook: str, *arguments: Any) -> None:
    method = getattr(callback, hook, None)
    if method is not None:
        method(*arguments)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _file(callback: Any, folder: Path) -> Path:
    return folder / STATE.format(type(callback).__name__)


def _save(callback: Any, folder: Path) -> None:
    import torch

    state = callback.state_dict() if hasattr(callback, "state_dict") else None
    if state and folder.is_dir():
        torch.save(state, _file(callback, folder))


def _resume(callback: Any, folder: Path) -> None:
    import torch

    file = _file(callback, folder)
    if hasattr(callback, "load_state_dict") and file.is_file():
        # Numbers, texts and tensors only: a checkpoint may come from somebody else.
        callback.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
