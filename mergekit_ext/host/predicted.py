"""Dtype and shape of each tensor of an output, from the headers of the inputs."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from mergekit_ext.dtypes import dtype_name
from mergekit_ext.host.checks.plan import FoundTensor
from mergekit_ext.host.checks.settings import dtype_of, wants_tokenizer
from mergekit_ext.io.planned import Entry

_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def predicted(located: Iterable[FoundTensor], config: Any) -> dict[str, Entry | None]:
    """What will be written, by name; None for tensors whose shape or dtype no header tells.

    Args:
        located: the tensors of the output, as the checks have found them in the inputs.
        config: mergekit's configuration.
    """
    built = wants_tokenizer(config)
    return {tensor.planned.weight.name: _entry(tensor, config, built) for tensor in located}


def _entry(tensor: FoundTensor, config: Any, built: bool) -> Entry | None:
    weight, headers = tensor.planned.weight, tensor.headers
    axis = weight.vocabulary_axis
    # A tokenizer that is built decides the vocabulary; and what some inputs lack may be left out.
    unknown = len(headers) < len(tensor.found) or tensor.missing or (built and axis is not None)
    if unknown or not headers:
        return None
    shape = list(headers[0].shape)
    if axis is not None and axis < len(shape):
        shape[axis] = min(header.shape[axis] for header in headers)
    read = dtype_of(weight.force_dtype or config.dtype)
    dtypes = [read or _DTYPES.get(header.dtype) for header in headers]
    if None in dtypes:
        return None
    made = dtype_of(weight.force_dtype or config.out_dtype)
    return Entry.of(weight.name, made or functools.reduce(torch.promote_types, dtypes), shape)
