"""What a merge reads, writes and holds, from headers alone: see `Estimate` and `memory`.

`predicted` gives dtype and shape of each tensor of the output.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.core.memory import Need, copies_of, square_of, working
from mergekit_ext.errors import FileError
from mergekit_ext.host.checks.plan import Inventory, PlannedTensor
from mergekit_ext.host.checks.report import Estimate
from mergekit_ext.host.checks.settings import dtype_of, wants_tokenizer
from mergekit_ext.host.inputs import cached_folder, models_of
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.io.headers import (
    BITS,
    TensorHeader,
    dtype_name,
    read_index,
    weights_of,
)
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
_TOKENIZER = "tokenizer.json"
# From which `_TOKENIZER` is made when it is loaded, and larger by about this factor.
_OTHERS = ("vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_CONVERTED = 4
# Measured with 32,000 to 128,000 tokens: tables, texts and merges of every tokenizer, and what
# reads and copies one.
_EACH, _ONCE = 8, 16

# From the sizes of the inputs along the axis of the vocabulary to that of the output.
Rows = Callable[[Sequence[int]], int]


def estimate(
    inventory: Inventory,
    shared: Sequence[Mapping[str, Any]],
    collects: bool,
    tokens: int | None = None,
) -> Estimate | None:
    """Add everything up; None when the shape of some tensor is known from no input.

    Without `tokens`, the least that can be is written, and the most is held.

    Args:
        inventory: with every tensor located.
        shared: the distinct sets of shared parameters.
        collects: whether the output's tensors are collected for a shard, not written one by one.
        tokens: rows of the embeddings, where a tokenizer that is built decides them.
    """
    config, options, method = inventory.config, inventory.options, inventory.method
    if not all(tensor.headers for tensor in inventory.located):
        return None
    bounds = _rows(inventory, tokens)
    if bounds is None:
        return None
    least, most = bounds
    read = {
        (model, stored.name): stored.nbytes
        for tensor in inventory.located
        for model, stored in _each(tensor)
    }
    entries = [_entry(tensor, config, least) for tensor in inventory.located]
    needs = [_need(tensor, _entry(tensor, config, most), inventory) for tensor in inventory.located]
    passes = [method.passes(s) for s in shared] if isinstance(method, ExtMethod) else []
    written = sum(entry.nbytes for entry in entries)
    need = max(needs, key=lambda need: need.most, default=Need("nothing"))
    pickles = pickled_bytes({model for model, _ in read}, options)
    loaders = {"tokenizers": tokenizer_bytes(config, options), "whole pickles": pickles}
    need = replace(need, parts={**need.parts, **loaders})
    if collects:
        shard = options.out_shard_size
        collected = {"the shard": min(shard, written) if shard > 0 else written}
        need = replace(need, parts={**need.parts, **collected}, remedy="Use smaller shards.")
    return Estimate(
        bytes_read=sum(read.values()) * max(passes, default=1),
        bytes_written=written,
        bytes_held=need.bytes,
        tensors=len(entries),
        parameters=sum(math.prod(entry.shape) for entry in entries),
        need=need,
    )


def _rows(inventory: Inventory, tokens: int | None) -> tuple[Rows, Rows] | None:
    """The fewest and the most rows of embeddings; None if only a model elsewhere decides them."""
    config = inventory.config
    if not wants_tokenizer(config):
        return min, min  # vocabularies are cut
    asked = config.tokenizer
    source = asked.source if asked else config.tokenizer_source
    if tokens is not None:
        return lambda _: tokens, lambda _: tokens
    more = len(asked.tokens or ()) + (asked.pad_to_multiple_of or 1) - 1 if asked else 0
    if source == "union":
        return max, lambda sizes: sum(sizes) + more
    if source == "base" or source in inventory.models:
        return min, lambda sizes: max(sizes) + more
    return None


def _need(tensor: PlannedTensor, entry: TensorHeader, inventory: Inventory) -> Need:
    size, device = math.prod(entry.shape), str(inventory.options.device).partition(":")[0]
    models = max(1, sum(model != tensor.group.base for model in tensor.found))
    bits = BITS.get(_loaded(tensor, inventory.config), 32)
    width, loaded = max(bits // 8, _LEAST_BYTES), size * bits // 8
    rows_moved = wants_tokenizer(inventory.config) and _axis(tensor) is not None
    merging = {
        "the result": entry.nbytes,
        **working(
            copies_of(inventory.method)(models, square_of(entry.shape)),
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
        return Need(tensor.name, {**inputs, **merging}, {}, _REMEDY)
    # An input passes through the CPU on its way to the device, the result on its way to the disk.
    passing = {"one input": loaded, "the result": entry.nbytes}
    on_device = {"inputs": len(tensor.found) * loaded, **merging, "the result before": entry.nbytes}
    return Need(tensor.name, {**inputs, **passing}, on_device, _REMEDY)


def _each(tensor: PlannedTensor) -> list[tuple[Any, TensorHeader]]:
    return [(model, header or tensor.headers[0]) for model, header in tensor.found.items()]


def _unmapped(header: TensorHeader, model: Any, bits: int, count: int) -> int:
    """Bytes that an input takes in memory: none where it is mapped as it is stored."""
    if getattr(model, "lora", None) is not None and header.file is None:
        return count * (_ADAPTED + bits // 8)
    mapped = header.file is not None and header.file.suffix == ".safetensors"
    as_stored = BITS.get(header.dtype, 32) == bits and math.prod(header.shape) == count
    return 0 if mapped and as_stored else header.nbytes * (not mapped) + count * bits // 8


def predicted(located: Iterable[PlannedTensor], config: Any) -> dict[str, TensorHeader | None]:
    """Return what will be written, by name; None for tensors that no header determines.

    Args:
        located: the tensors of the output, as the checks have found them in the inputs.
        config: mergekit's configuration.
    """
    built = wants_tokenizer(config)
    found: dict[str, TensorHeader | None] = {}
    for tensor in located:
        # A tokenizer that is built decides the vocabulary; and what some inputs lack may be left
        # out.
        unknown = not tensor.headers or len(tensor.headers) < len(tensor.found) or tensor.missing
        entry = None
        if not unknown and not (built and _axis(tensor) is not None):
            entry = _entry(tensor, config, min)
        found[tensor.name] = entry if entry and entry.dtype in _DTYPES else None
    return found


def _entry(tensor: PlannedTensor, config: Any, rows: Rows) -> TensorHeader:
    made = dtype_of(tensor.weight.force_dtype or config.out_dtype)
    dtype = _loaded(tensor, config) if made is None else dtype_name(made)
    shape, axis = list(tensor.headers[0].shape), _axis(tensor)
    if axis is not None and axis < len(shape):
        shape[axis] = rows([h.shape[axis] for h in tensor.headers if axis < len(h.shape)])
    size = math.prod(shape) * BITS.get(dtype, 32) // 8
    return TensorHeader(tensor.name, dtype, tuple(shape), size)


def _axis(tensor: PlannedTensor) -> int | None:
    axis: int | None = tensor.weight.vocabulary_axis
    return axis


def _loaded(tensor: PlannedTensor, config: Any) -> str:
    """The format's name of the dtype that mergekit loads a tensor in: what holds all inputs."""
    forced = dtype_of(tensor.weight.force_dtype or config.dtype)
    if forced is not None:
        return dtype_name(forced)
    names = [header.dtype for header in tensor.headers]
    if not all(name in _DTYPES for name in names):
        return max(names, key=lambda name: BITS.get(name, 32))
    return dtype_name(functools.reduce(torch.promote_types, [_DTYPES[name] for name in names]))


def tokenizer_bytes(config: Any, options: Any) -> int:
    """Return the memory that tokenizers take; 0 where mergekit builds none."""
    if not wants_tokenizer(config):
        return 0
    places = {_place(model, options) for model in models_of(config)}
    files = [file for place in places if place and (file := _tokenizer_of(place))]
    lengths = [f.stat().st_size * (1 if f.name == _TOKENIZER else _CONVERTED) for f in files]
    return _EACH * sum(lengths) + _ONCE * max(lengths, default=0)


def _tokenizer_of(folder: Path) -> Path | None:
    return next((folder / n for n in (_TOKENIZER, *_OTHERS) if (folder / n).is_file()), None)


def pickled_bytes(models: Iterable[Any], options: Any) -> int:
    """Bytes that the loaders of these models hold of pickles: of each the largest file.

    Args:
        models: mergekit's `ModelReference`s, or names of files as mergekit-pytorch has them. Those
            with adapters on one base share its loader.
        options: mergekit's. With `lazy_unpickle` single tensors are read.
    """
    if options.lazy_unpickle:
        return 0
    return sum(_largest(place) for place in {_place(model, options) for model in models} if place)


def _place(model: Any, options: Any) -> Path | None:
    """The folder or file that a model is read from; None while it is not on this machine."""
    if isinstance(model, str):
        return Path(model)
    if os.path.exists(model.model.path):
        return Path(model.model.path)
    return cached_folder(model.model, options)


def _largest(place: Path) -> int:
    weights = weights_of(place) if place.is_dir() else place
    if weights is None:
        return 0
    try:
        index = read_index(weights) if weights.name.endswith(".index.json") else {"": weights.name}
        files = {place / shard for shard in index.values()} if place.is_dir() else {place}
        pickles = [file for file in files if file.suffix != ".safetensors"]
        return max((file.stat().st_size for file in pickles), default=0)
    except (FileError, OSError):  # said where headers are read
        return 0
