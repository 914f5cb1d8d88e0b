"""The tensors of a module or state dict in memory, by name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def named(model: Any) -> dict[str, tuple[str, Tensor]]:
    """Return the tensors of a module or state dict, each with the first of its names.

    Tied weights have several. Hooks may have changed the names of a module's.
    """
    first: dict[object, str] = {}
    found: dict[str, tuple[str, Tensor]] = {}
    state = model if isinstance(model, Mapping) else model.state_dict()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            key = place if tensor.data_ptr() else name  # an empty one has no place
            found[name] = first.setdefault(key, name), tensor.detach()
    return found
