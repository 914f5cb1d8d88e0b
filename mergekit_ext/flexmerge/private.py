"""Tensors that one task keeps for itself: copied as they are, but not unseen."""

from __future__ import annotations

from torch import Tensor

from mergekit_ext.flexmerge.finite import COPIED, require_finite
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.io.headers import TensorHeader


def stored_private(reader: BlockReader, task: int, header: TensorHeader) -> Tensor:
    """The bytes of a private tensor, as `BlockReader.read_stored` gives them.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    stored = reader.read_stored(task, header.name)
    dtype = (FLOATING | COPIED).get(header.dtype)
    if dtype is not None:
        require_finite(stored.view(dtype), header.name, reader.layout.tasks[task])
    return stored
