"""What a merge reads, writes and holds, from headers alone: see `Estimate` and `memory`.

`predicted` gives dtype and shape of each tensor of the output.
"""

from __future__ import annotations

import filecmp
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.core.memory import Need, copies_of, square_of, working
from mergekit_ext.host.adapters.loader import file_with_adapter
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.plan import Inventory, PlannedTensor
from mergekit_ext.host.checks.report import Estimate
from mergekit_ext.host.checks.settings import dtype_of, wants_tokenizer
from mergekit_ext.host.inputs import cached_folder
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.io.headers import (
    BITS,
    HeaderError,
    TensorHeader,
    dtype_name,
    read_index,
    weights_of,
)
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
_TOKENIZER = "tokenizer.json"
# From which `_TOKENIZER` is made when it is loaded, and larger by about this factor.
_OTHERS = ("vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_CONVERTED = 4
# Measured with 32,000 to 128,000 tokens: tables, texts and merges of every tokenizer, and what
# reads, copies and compares one.
_EACH, _ONCE = 8, 16
_COMPARED = 256 << 20

Rows = Callable[[Sequence[int]], int]


def estimate(
    inventory: Inventory, shared: Sequence[Mapping[str, Any]], collects: bool
) -> Estimate | None:
    """Add everything up; None when the shape of some tensor is known from no input.

    Args:
        inventory: with every tensor located.
        shared: the distinct sets of shared parameters.
        collects: whether the output's tensors are collected for a shard, not written one by one.
    """
    config, options, method = inventory.config, inventory.options, inventory.method
    vocabulary = Vocabulary.of(config, options)
    rows: Rows = vocabulary.most if vocabulary else min  # else they are cut to the smallest
    read: dict[tuple[Any, str], int] = {}
    written = parameters = 0
    needs = []
    for tensor in inventory.located:
        if not tensor.headers:
            return None
        for model, stored in _each(tensor):
            read[model, stored.name] = stored.nbytes
        shape = _shape(tensor, rows)
        bits = BITS.get(_loaded(tensor, config), 32)
        made = dtype_of(tensor.weight.force_dtype or config.out_dtype)
        out = bits if made is None else BITS.get(dtype_name(made), bits)
        parameters += math.prod(shape)
        written += math.prod(shape) * out // 8
        rows_moved = vocabulary is not None and tensor.weight.vocabulary_axis is not None
        needs.append(_need(tensor, shape, bits, -(-out // 8), options, method, rows_moved))
    passes = [method.passes(s) for s in shared] if isinstance(method, ExtMethod) else []
    need = max(needs, key=lambda need: need.most, default=Need("nothing"))
    loaders = {
        "tokenizers": vocabulary.bytes if vocabulary else 0,
        "whole pickles": pickled_bytes({model for model, _ in read}, options),
    }
    need = replace(need, parts={**need.parts, **loaders})
    if collects:
        shard = options.out_shard_size
        collected = {"the shard": min(shard, written) if shard > 0 else written}
        need = replace(need, parts={**need.parts, **collected}, remedy="Use smaller shards.")
    return Estimate(
        bytes_read=sum(read.values()) * max(passes, default=1),
        bytes_written=written,
        bytes_held=need.bytes,
        tensors=len(inventory.located),
        parameters=parameters,
        need=need,
    )


def _need(
    tensor: PlannedTensor,
    shape: tuple[int, ...],
    bits: int,
    out: int,
    options: Any,
    method: Any,
    rows_moved: bool,
) -> Need:
    size, device = math.prod(shape), str(options.device).partition(":")[0]
    models = max(1, sum(model != tensor.group.base for model in tensor.found))
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
        return Need(tensor.name, {**inputs, **merging}, {}, _REMEDY)
    # An input passes through the CPU on its way to the device, the result on its way to the disk.
    passing = {"one input": loaded, "the result": size * out}
    on_device = {"inputs": len(tensor.found) * loaded, **merging, "the result before": size * out}
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


def predicted(located: Iterable[PlannedTensor], config: Any) -> dict[str, Entry | None]:
    """Return what will be written, by name; None for tensors that no header determines.

    Args:
        located: the tensors of the output, as the checks have found them in the inputs.
        config: mergekit's configuration.
    """
    built = wants_tokenizer(config)
    return {tensor.name: _entry(tensor, config, built) for tensor in located}


def _entry(tensor: PlannedTensor, config: Any, built: bool) -> Entry | None:
    # A tokenizer that is built decides the vocabulary; and what some inputs lack may be left out.
    unknown = len(tensor.headers) < len(tensor.found) or tensor.missing or not tensor.headers
    if unknown or (built and tensor.weight.vocabulary_axis is not None):
        return None
    loaded = _loaded(tensor, config)
    if loaded not in _DTYPES:
        return None
    made = dtype_of(tensor.weight.force_dtype or config.out_dtype) or _DTYPES[loaded]
    return Entry.of(tensor.name, made, _shape(tensor, min))


def _shape(tensor: PlannedTensor, rows: Rows) -> tuple[int, ...]:
    shape, axis = list(tensor.headers[0].shape), tensor.weight.vocabulary_axis
    if axis is not None and axis < len(shape):
        sizes = [header.shape[axis] for header in tensor.headers if axis < len(header.shape)]
        shape[axis] = rows(sizes)
    return tuple(shape)


def _loaded(tensor: PlannedTensor, config: Any) -> str:
    """The format's name of the dtype that mergekit loads a tensor in: what holds all inputs."""
    forced = dtype_of(tensor.weight.force_dtype or config.dtype)
    if forced is not None:
        return dtype_name(forced)
    names = [header.dtype for header in tensor.headers]
    if not all(name in _DTYPES for name in names):
        return max(names, key=lambda name: BITS.get(name, 32))
    return dtype_name(functools.reduce(torch.promote_types, [_DTYPES[name] for name in names]))


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the output, where mergekit builds a tokenizer and aligns the inputs.

    Attributes:
        joined: whether the tokens of different files come together.
        more: how many rows come on top.
        bytes: memory that the tokenizers take.
    """

    joined: bool
    more: int
    bytes: int

    @classmethod
    def of(cls, config: Any, options: Any) -> Vocabulary | None:
        """Return what is known before a tokenizer is loaded; None if each tensor keeps its rows."""
        if not wants_tokenizer(config):
            return None
        asked = config.tokenizer
        places = [_place(model, options) for model in models_at(config)]
        files = [_tokenizer_of(place) for place in dict.fromkeys(places) if place is not None]
        lengths = [
            file.stat().st_size * (1 if file.name == _TOKENIZER else _CONVERTED) if file else 0
            for file in files
        ]
        alike = (
            None not in places
            and max(lengths) <= _COMPARED
            and all(
                one and other and filecmp.cmp(one, other, shallow=False)
                for one, other in itertools.pairwise(files)
            )
        )
        more = len(asked.tokens or ()) + (asked.pad_to_multiple_of or 1) - 1 if asked else 0
        source = asked.source if asked else config.tokenizer_source
        return cls(
            source == "union" and not alike,
            more,
            _EACH * sum(lengths) + _ONCE * max(lengths, default=0),
        )

    def most(self, sizes: Sequence[int]) -> int:
        """Return the rows that the output may have, if the inputs have `sizes`."""
        return (sum(sizes) if self.joined else max(sizes)) + self.more


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
        reference = file_with_adapter(model)
        return Path(model if reference is None else reference.model.path)
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
    except (HeaderError, OSError):  # said where headers are read
        return 0
