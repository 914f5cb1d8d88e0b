"""What a merge reads, writes and holds, from headers alone: see `Estimate` and `memory`.

`predicted` gives dtype and shape of each tensor of the output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mergekit_ext.core.memory import Need, copies_of, square_of, working
from mergekit_ext.host.checks.loaders import Vocabulary, pickled_bytes
from mergekit_ext.host.checks.plan import FoundTensor
from mergekit_ext.host.checks.report import Estimate
from mergekit_ext.host.checks.settings import dtype_of, wants_tokenizer
from mergekit_ext.io.headers import BITS, TensorHeader, dtype_name
from mergekit_ext.io.planned import Entry
from mergekit_ext.kernels.numerics import chunk_length

_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
# Methods compute in float32 at least, whatever the dtype of the files.
_LEAST_BYTES = 4
# An adapter's change of a tensor is added to it in float32: the tensor, the change, the sum.
_ADAPTED = 3 * _LEAST_BYTES
_REMEDY = (
    "Merge fewer models at a time, or take a method that works in pieces: `nan`, `nan_ties`, "
    "`nan_task_arithmetic`, `emr`."
)


def estimate(
    located: Sequence[FoundTensor],
    config: Any,
    options: Any,
    method: Any,
    shared: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary | None,
    collects: bool = False,
) -> Estimate | None:
    """Add everything up; None when the shape of some tensor is known from no input.

    `vocabulary`: what is known of the one that a tokenizer decides. Without, vocabularies that
    differ are cut to the smallest. `collects`: the output's tensors are collected for a shard, not
    written one by one.
    """
    read: dict[tuple[Any, str], int] = {}
    written = parameters = 0
    needs = []
    for tensor in located:
        headers = tensor.headers
        if not headers:
            return None
        for model, header in tensor.found.items():
            stored = header or headers[0]
            read[model, stored.name] = stored.nbytes
        shape = _shape(tensor, headers, vocabulary.at_least if vocabulary else min)
        most = _shape(tensor, headers, vocabulary.at_most if vocabulary else min)
        bits = BITS.get(_loaded(tensor, headers, config), 32)
        made = dtype_of(tensor.planned.weight.force_dtype or config.out_dtype)
        count, out = math.prod(shape), bits if made is None else BITS.get(dtype_name(made), bits)
        parameters += count
        written += count * out // 8
        rows_moved = bool(vocabulary) and tensor.planned.weight.vocabulary_axis is not None
        needs.append(_need(tensor, most, bits, -(-out // 8), options, method, rows_moved))
    passes = getattr(method, "passes", None)
    times = max((int(passes(s)) for s in shared), default=1) if callable(passes) else 1
    need = max(needs, key=lambda need: need.most, default=Need("nothing"))
    loaders = {
        "tokenizers": vocabulary.bytes if vocabulary else 0,
        "whole pickles": pickled_bytes({model for model, _ in read}, options),
    }
    need = replace(need, parts={**need.parts, **loaders})
    if collects:
        shard = options.out_shard_size
        collected = min(shard, written) if shard > 0 else written
        need = Need(
            need.what, {**need.parts, "the shard": collected}, need.device, "Use smaller shards."
        )
    return Estimate(
        bytes_read=sum(read.values()) * times,
        bytes_written=written,
        bytes_held=need.bytes,
        tensors=len(located),
        parameters=parameters,
        need=need,
    )


def _need(
    tensor: FoundTensor,
    shape: tuple[int, ...],
    bits: int,
    out: int,
    options: Any,
    method: Any,
    rows_moved: bool,
) -> Need:
    name, size = tensor.planned.weight.name, math.prod(shape)
    device = str(options.device).partition(":")[0]
    models = max(1, sum(model != tensor.planned.base for model in tensor.found))
    width = max(bits // 8, _LEAST_BYTES)
    loaded = size * bits // 8
    merging = {
        "the result": size * out,
        **working(
            copies_of(method)(models, square_of(shape)),
            size * width,
            models,
            piece=chunk_length(device) * width,
            threads=torch.get_num_threads() if device == "cpu" else 1,
        ),
    }
    inputs = {
        "inputs that are not mapped": sum(
            _unmapped(header, model, bits, math.prod(header.shape) if rows_moved else size)
            for model, header in _each(tensor)
        )
    }
    if rows_moved:  # to where one tokenizer has them; those that a model lacks are made before
        inputs["aligned vocabularies"] = (len(tensor.found) + 1) * loaded
    if device == "cpu":
        return Need(name, {**inputs, **merging}, {}, _REMEDY)
    # An input passes through the CPU on its way to the device, the result on its way to the disk.
    passing = {"one input": loaded, "the result": size * out}
    on_device = {"inputs": len(tensor.found) * loaded, **merging, "the result before": size * out}
    return Need(name, {**inputs, **passing}, on_device, _REMEDY)


def _each(tensor: FoundTensor) -> list[tuple[Any, TensorHeader]]:
    headers = tensor.headers
    return [(model, header or headers[0]) for model, header in tensor.found.items()]


def _unmapped(header: TensorHeader, model: Any, bits: int, count: int) -> int:
    """Bytes that an input takes in memory: none where it is mapped as it is stored."""
    if getattr(model, "lora", None) is not None and header.file is None:
        return count * (_ADAPTED + bits // 8)
    mapped = header.file is not None and header.file.suffix == ".safetensors"
    as_stored = BITS.get(header.dtype, 32) == bits and math.prod(header.shape) == count
    return 0 if mapped and as_stored else header.nbytes * (not mapped) + count * bits // 8


def predicted(located: Iterable[FoundTensor], config: Any) -> dict[str, Entry | None]:
    """Return what will be written, by name; None for tensors that no header determines.

    Args:
        located: the tensors of the output, as the checks have found them in the inputs.
        config: mergekit's configuration.
    """
    built = wants_tokenizer(config)
    return {tensor.name: _entry(tensor, config, built) for tensor in located}


def _entry(tensor: FoundTensor, config: Any, built: bool) -> Entry | None:
    weight, headers = tensor.planned.weight, tensor.headers
    # A tokenizer that is built decides the vocabulary; and what some inputs lack may be left out.
    unknown = len(headers) < len(tensor.found) or tensor.missing
    if unknown or not headers or (built and weight.vocabulary_axis is not None):
        return None
    loaded = _loaded(tensor, headers, config)
    if loaded not in _DTYPES:
        return None
    made = dtype_of(weight.force_dtype or config.out_dtype) or _DTYPES[loaded]
    return Entry.of(weight.name, made, _shape(tensor, headers, min))


def _shape(
    tensor: FoundTensor, headers: list[TensorHeader], rows: Callable[[Iterable[int]], int]
) -> tuple[int, ...]:
    shape, axis = list(headers[0].shape), tensor.planned.weight.vocabulary_axis
    if axis is not None and axis < len(shape):
        sizes = [header.shape[axis] for header in headers if axis < len(header.shape)]
        shape[axis] = rows(sizes)
    return tuple(shape)


def _loaded(tensor: FoundTensor, headers: list[TensorHeader], config: Any) -> str:
    """The format's name of the dtype that mergekit loads a tensor in: what holds all inputs."""
    forced = dtype_of(tensor.planned.weight.force_dtype or config.dtype)
    if forced is not None:
        return dtype_name(forced)
    known = [_DTYPES.get(header.dtype) for header in headers]
    if None in known:
        return max((header.dtype for header in headers), key=lambda name: BITS.get(name, 32))
    return dtype_name(functools.reduce(torch.promote_types, known))
