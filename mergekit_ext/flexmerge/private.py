"""Tensors that one task keeps for itself: copied as they are, but not unseen."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ext.errors import NonFiniteError
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.headers import TensorHeader
from mergekit_ext.kernels.numerics import all_finite, count_non_finite

# They are copied, so that dtypes without arithmetic may be among them.
_EIGHT_BITS = {"F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn}


def stored_private(reader: BlockReader, task: int, header: TensorHeader) -> Tensor:
    """The bytes of a private tensor, as `BlockReader.read_stored` gives them.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    stored = reader.read_stored(task, header.name)
    dtype = (FLOATING | _EIGHT_BITS).get(header.dtype)
    if dtype is not None:
        require_finite(stored.view(dtype), header.name, reader.layout.tasks[task])
    return stored


def require_finite(tensor: Tensor, name: str, task: str) -> None:
    """Raise `NonFiniteError` if a tensor of a task holds NaN or infinity; integers never do."""
    if not tensor.is_floating_point():
        return
    wide = tensor.float() if tensor.dtype in _EIGHT_BITS.values() else tensor
    if not all_finite(wide):
        raise NonFiniteError(name, task, count_non_finite(wide), wide.numel())
