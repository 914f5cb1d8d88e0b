"""Models and processes as training wraps them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from mergekit_ext.errors import MergeError

_T = TypeVar("_T")


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


def from_main(make: Callable[[], _T]) -> _T:
    """Return what `make` returns in the main process, in every process of the training.

    Raises:
        MergeError: in the others, if `make` fails in the main process, which raises its own error.
    """
    if not _is_distributed() or distributed.get_world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    error: Exception | None = None
    if is_main():
        try:
            box[0] = make()
        except Exception as raised:
            error, box[1] = raised, f"{type(raised).__name__}: {raised}"
    distributed.broadcast_object_list(box, src=0)
    if error is not None:
        raise error
    if box[1] is not None:
        raise MergeError(f"the main process could not merge: {box[1]}")
    value: _T = box[0]
    return value


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
