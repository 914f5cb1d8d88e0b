"""Models and processes as training wraps them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, MergeError, Problem


def is_main() -> bool:
    """Whether this is the process that keeps snapshots and merges: rank 0, or the only one."""
    if _distributed():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def unwrapped(model: Any) -> Any:
    """The user's module inside of what torch and accelerate wrap around it.

    Raises:
        ConfigError: its parameters are divided among processes.
    """
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        else:
            break
    if any(_divided(parameter) for parameter in model.parameters()):
        raise ConfigError(
            [
                Problem(
                    "model",
                    "parameters that are divided among processes (FSDP or ZeRO-3)",
                    "whole parameters in every process",
                    'Save full checkpoints and use `on="save"`, which merges saved folders.',
                )
            ],
            "merging checkpoints",
        )
    return model


def _divided(parameter: Tensor) -> bool:
    return (
        hasattr(parameter, "device_mesh")
        or hasattr(parameter, "ds_id")
        or type(parameter).__name__ == "FlatParameter"
    )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def several() -> bool:
    """Whether other processes train the same model."""
    return _distributed() and torch.distributed.get_world_size() > 1


def agree(decision: Any = None, error: BaseException | None = None) -> Any:
    """Tell the other processes what the main one decided, and return it everywhere.

    Args:
        decision: of the main process; those of the others do not count.
        error: what went wrong in the main process.

    Raises:
        MergeError: in the other processes, if there was an error. The main one raises its own.
    """
    if not several():
        return decision
    box = [(decision, None if error is None else f"{type(error).__name__}: {error}")]
    torch.distributed.broadcast_object_list(box, src=0)
    decided, failed = box[0]
    if failed is not None and not is_main():
        raise MergeError(f"the main process could not merge: {failed}")
    return decided


def send(tensors: dict[str, Tensor]) -> None:
    """Overwrite tensors, which every process has, with those of the main process."""
    if several():
        for name in sorted(tensors):
            torch.distributed.broadcast(tensors[name], src=0)
