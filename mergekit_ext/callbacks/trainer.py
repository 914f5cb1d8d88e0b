"""Training: transformers' Trainer, and models and processes as torch and accelerate wrap them."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from mergekit_ext.errors import MergeError, MergeWarning, warn
from mergekit_ext.events import TRAINING_HOOKS, require_hooks

# On a Trainer's control object, which its callbacks share: the files of their states.
_FILES = "_callback_state_files"


def as_trainer_callback(callback: Any) -> Any:
    """Return a ``transformers.TrainerCallback`` that calls `callback` while a Trainer trains.

    The callback gets ``state.global_step`` as the step, and `on_log` in the main process only. Its
    state, if it has any, is saved in each checkpoint as ``callback_<class>.pt`` (with a number for
    a second one of its class) and taken over when the Trainer resumes from a checkpoint in its
    output folder.

    Raises:
        TypeError: it has none of the methods in `TRAINING_HOOKS`, or with other arguments.
    """
    from transformers import TrainerCallback

    require_hooks(callback, TRAINING_HOOKS, "callback")
    stateful = hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
    name = type(callback).__name__

    def call(hook: str, state: Any, argument: Any) -> None:
        getattr(callback, hook, lambda *_: None)(state.global_step, argument)

    class Adapter(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Calls the methods of `callback` with what they take."""

        def __init__(self) -> None:
            self.callback = callback
            self.file = ""

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            taken = vars(control).setdefault(_FILES, set())
            files = (f"callback_{name}{f'_{i}' * (i > 1)}.pt" for i in itertools.count(1))
            self.file = self.file or next(file for file in files if file not in taken)
            taken.add(self.file)
            if state.global_step and stateful:
                _resume(callback, _checkpoint(args, state) / self.file)
            call("on_train_begin", state, others["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            call("on_step_end", state, others["model"])

        def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.is_world_process_zero:
                call("on_log", state, others.get("logs") or {})

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            folder = _checkpoint(args, state)
            call("on_save", state, folder)
            keeps = stateful and state.is_world_process_zero and folder.is_dir()
            if keeps and (saved := callback.state_dict()):
                torch.save(saved, folder / self.file)

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            call("on_train_end", state, others["model"])

    return Adapter()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _resume(callback: Any, file: Path) -> None:
    if file.is_file():
        # Numbers, texts and tensors only: a checkpoint may come from anywhere.
        callback.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    elif callback.state_dict():
        text = f"there is no {file}: it goes on without what it had before the checkpoint"
        warn(MergeWarning(f"{type(callback).__name__}: {text}."))


def unwrapped(model: Any) -> Any:
    """Return the user's module inside of what torch and accelerate wrap around it."""
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):  # torch.compile
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model


def is_divided(model: Any) -> bool:
    """Whether parameters are divided among processes (FSDP, ZeRO-3)."""
    return any(
        hasattr(p, "device_mesh") or hasattr(p, "ds_id") or type(p).__name__ == "FlatParameter"
        for p in model.parameters()
    )


def is_main() -> bool:
    """Whether this process keeps snapshots and merges: rank 0, or the only one."""
    if _is_distributed():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def from_main(make: Callable[[], Any]) -> Any:
    """Return what `make` returns in the main process, in every process of the training.

    If it fails there, the others raise `MergeError`.
    """
    if not _is_distributed() or distributed.get_world_size() == 1:
        return make()
    sent: list[Any] = [None, None]
    try:
        if is_main():
            sent[0] = make()
    except BaseException as error:  # Ctrl-C, too
        sent[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        distributed.broadcast_object_list(sent, src=0)
    if sent[1] is not None:
        raise MergeError(f"the main process could not merge: {sent[1]}")
    return sent[0]


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
