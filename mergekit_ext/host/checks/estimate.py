"""What a merge reads, writes and holds, from headers alone. See `Estimate` for what counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ext.headers import BITS, TensorHeader, dtype_name
from mergekit_ext.host.checks.locate import FoundTensor
from mergekit_ext.host.checks.report import Estimate
from mergekit_ext.host.checks.settings import dtype_of

# Methods compute in float32 at least, whatever the dtype of the files.
_LEAST_BYTES = 4


def estimate(
    located: Sequence[FoundTensor],
    config: Any,
    options: Any,
    method: Any,
    shared: Sequence[Mapping[str, Any]],
    largest_vocabulary: bool,
) -> Estimate | None:
    """Add everything up; None when the shape of some tensor is known from no input.

    `largest_vocabulary`: a tokenizer decides the vocabulary; the largest one of the inputs is
    taken for it. Otherwise vocabularies that differ are cut to the smallest.
    """
    read: dict[tuple[Any, str], int] = {}
    written = parameters = largest = 0
    for tensor in located:
        headers = tensor.headers
        if not headers:
            return None
        for model, header in tensor.found.items():
            stored = header or headers[0]
            read[model, stored.name] = stored.nbytes
        count = _elements(tensor, headers, largest_vocabulary)
        bits = _merge_bits(tensor, headers, config)
        forced = tensor.planned.weight.force_dtype or config.out_dtype
        parameters += count
        written += count * _bits(forced, bits) // 8
        held = count * max(bits // 8, _LEAST_BYTES) * (len(tensor.found) + 2)
        largest = max(largest, held)
    passes = getattr(method, "passes", None)
    times = max((int(passes(s)) for s in shared), default=1) if callable(passes) else 1
    shard = options.out_shard_size
    return Estimate(
        bytes_read=sum(read.values()) * times,
        bytes_written=written,
        bytes_held=largest + (min(shard, written) if shard > 0 else written),
        tensors=len(located),
        parameters=parameters,
    )


def _elements(tensor: FoundTensor, headers: list[TensorHeader], largest: bool) -> int:
    shape, axis = list(headers[0].shape), tensor.planned.weight.vocabulary_axis
    if axis is not None and axis < len(shape):
        sizes = [header.shape[axis] for header in headers if axis < len(header.shape)]
        shape[axis] = max(sizes) if largest else min(sizes)
    return math.prod(shape)


def _merge_bits(tensor: FoundTensor, headers: list[TensorHeader], config: Any) -> int:
    """Bits of an element as mergekit loads it."""
    import torch

    forced = tensor.planned.weight.force_dtype or config.dtype
    names = {header.dtype for header in headers}
    if names == {"BF16", "F16"}:  # promoted to what holds both
        return _bits(forced, torch.finfo(torch.float32).bits)
    return _bits(forced, max(BITS.get(name, 32) for name in names))


def _bits(name: str | None, otherwise: int) -> int:
    dtype = dtype_of(name)
    return otherwise if dtype is None else BITS.get(dtype_name(dtype), otherwise)
