"""What a task keeps for itself: whole tensors, and values in the dtype that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError
from peft_merge.adapter import Adapter
from peft_merge.io import whole
from peft_merge.saved import merge_saved


def private(adapter: Adapter, dtype: torch.dtype | None) -> Mapping[str, Callable[[], Tensor]]:
    """The whole tensors of an adapter, in `dtype` if one is given."""
    return {name: partial(merge_saved, name, [adapter], [1.0], dtype) for name in adapter.saved}


def of_the_base(adapters: Sequence[Adapter]) -> set[str]:
    """Whole tensors that all adapters carry with equal values, outside of `modules_to_save`.

    PEFT saves embeddings along when they are adapted. They replace the base's own, for all tasks.
    """
    first, *others = adapters
    return {
        name
        for name in first.saved
        if whole.module_to_save(name, first.config) is None
        and all(name in other.saved for other in others)
        and all(torch.equal(first.saved[name](), other.saved[name]()) for other in others)
    }


def private_bytes(adapters: Sequence[Adapter], dtype: torch.dtype | None) -> int:
    """Bytes of all whole tensors; those that are the base's for all tasks once."""
    common = of_the_base(adapters)
    return sum(
        tensor().nbytes
        for position, adapter in enumerate(adapters)
        for name, tensor in private(adapter, dtype).items()
        if position == 0 or name not in common
    )


def cast_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`, on the CPU.

    Raises:
        MergeError: a value leaves the dtype's range.
    """
    result = tensor.detach().to("cpu", dtype)
    if not bool(torch.isfinite(result).all()):
        raise MergeError(f"{name}: a value leaves the range of {dtype}. Use a wider dtype.")
    return result
