"""The bytes of stored tensors, compared without making tensors of them."""

from __future__ import annotations

from mergekit_ext.io.headers import TensorHeader

_CHUNK = 1 << 20


def same_bytes(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two tensors are stored alike; those of a pickle, at no known place, differ."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or not (one.file and other.file):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.offset)
        right.seek(other.offset)
        remaining = one.nbytes
        while remaining:
            size = min(remaining, _CHUNK)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True
