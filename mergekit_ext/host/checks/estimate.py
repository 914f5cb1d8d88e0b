"""What a merge reads, writes and holds, from headers alone, and the layout of its output."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.core.memory import Need, copies_of, sides_of, square_of, working
from mergekit_ext.core.parameters import AUTO, Values
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.host.checks.plan import Inventory, PlannedTensor
from mergekit_ext.host.checks.report import Estimate
from mergekit_ext.host.checks.settings import TOKENIZER_FILES, dtype_of, wants_tokenizer
from mergekit_ext.host.inputs import local_folder, models_of
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.io.headers import BITS, TensorHeader, dtype_name, weights_of
from mergekit_ext.io.quantised import QuantisedHeader
from mergekit_ext.kernels.linear_algebra import matmul
from mergekit_ext.kernels.numerics import chunk_length

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DTYPES = {**FLOATING, **{dtype_name(dtype): dtype for dtype in _WHOLE}}
# Methods compute in float32 at least, whatever the dtype of the files.
_LEAST_BYTES = 4
# The tensor, an adapter's change of it, their sum, and that in the dtype that it is read in.
_ADAPTED = 4
# Bytes for each number while a weight is made of codes.
_DEQUANTISED = 12
# Operations that take less than a minute, of which nothing is said; the product that is timed.
_SHORT, _SIDE = 1e12, 1024
_PIECEWISE = "`nan`, `nan_ties`, `nan_task_arithmetic`, `emr`"
_REMEDY = f"Merge fewer models at a time, or take a method that works in pieces: {_PIECEWISE}."
# Measured with 32,000 to 128,000 tokens: tables, texts and merges of a tokenizer, and what reads
# and copies it.
_TOKENIZER = 16


def estimate(inventory: Inventory, shared: Sequence[Values], tokens: int | None) -> Estimate | None:
    """Add everything up; None if something is wrong, or a model or a tensor's shape is not known.

    `shared` are the distinct sets of shared parameters; `tokens` are the rows of the embeddings
    where a tokenizer is built, None if they are not known: then the largest vocabulary counts.
    """
    config, options, method = inventory.config, inventory.options, inventory.method
    known = all(fact.tensors is not None for fact in inventory.models.values())
    known = known and all(tensor.headers for tensor in inventory.located)
    if not known or not inventory.located or not inventory.is_sound:
        return None
    rows: Callable[[Sequence[int]], int] = min  # vocabularies are cut
    if wants_tokenizer(config):
        rows = max if tokens is None else lambda _: tokens
    inputs = (each for tensor in inventory.located for each in _inputs(tensor))
    read = {(model, stored.name): stored.nbytes for model, stored in inputs}
    entries = [_entry(tensor, config, rows) for tensor in inventory.located]
    scaled = any(AUTO in values.values() for values in shared)
    needs = map(functools.partial(_need, inventory, scaled), inventory.located, entries)
    passes = [method.passes(s) for s in shared] if isinstance(method, ExtMethod) else []
    written = sum(entry.nbytes for entry in entries)
    need = max(needs, key=lambda need: need.bytes, default=Need("nothing"))
    kept = {"whole pickles": pickled_bytes({model for model, _ in read}, options)}
    if wants_tokenizer(config):
        folders = _folders(models_of(config), options)
        files = (folder / name for folder in folders for name in TOKENIZER_FILES)
        kept["tokenizers"] = _TOKENIZER * sum(f.stat().st_size for f in files if f.is_file())
    if not options.safe_serialization:  # otherwise tensors are written one by one
        shard = options.out_shard_size
        kept["the shard"] = min(shard, written) if shard > 0 else written
    need = replace(need, parts={**need.parts, **kept})
    work = _operations(inventory, entries)
    axis = {tensor.name: tensor.weight.vocabulary_axis for tensor in inventory.located}
    timed = sum(work.values()) >= _SHORT and not options.multi_gpu and str(options.device) == "cpu"
    each = _seconds_each() if timed else 0.0
    return Estimate(
        bytes_read=sum(read.values()) * max(passes, default=1),
        bytes_written=written,
        bytes_held=need.bytes,
        tensors=len(entries),
        parameters=sum(math.prod(entry.shape) for entry in entries),
        need=need,
        operations=work,
        seconds=sum(work.values()) * each,
        seconds_of_embeddings=each * sum(n for name, n in work.items() if axis[name] is not None),
    )


def _operations(inventory: Inventory, entries: Sequence[TensorHeader]) -> dict[str, float]:
    """Return how many operations of products each tensor takes; empty if the method has few."""
    method, found = inventory.method, dict[str, float]()
    count = method.declared.operations if isinstance(method, ExtMethod) else None
    if count is None:
        return {}
    for tensor, entry in zip(inventory.located, entries, strict=True):
        sides, based = sides_of(entry.shape), tensor.group.base in tensor.found
        matrices = 0.0 if tensor.copied else math.prod(entry.shape) / (math.prod(sides) or 1)
        found[tensor.name] = count(len(tensor.found) - based, based, *sides) * matrices
    return found


def _seconds_each() -> float:
    """Return how long an operation of a product takes on the CPU."""
    square, timed = torch.ones(_SIDE, _SIDE), []
    for _ in range(4):  # the first one starts threads, and other work may disturb one
        started = time.perf_counter()
        matmul(square, square)
        timed.append(time.perf_counter() - started)
    return min(timed) / (2.0 * _SIDE**3)


def _inputs(tensor: PlannedTensor) -> list[tuple[Any, TensorHeader]]:
    return [(model, header or tensor.headers[0]) for model, header in tensor.found.items()]


def _need(inventory: Inventory, scaled: bool, tensor: PlannedTensor, entry: TensorHeader) -> Need:
    config, options = inventory.config, inventory.options
    gpus = torch.accelerator.current_accelerator() if options.multi_gpu else None
    device = str(gpus.type if gpus else options.device).partition(":")[0]
    size, dtype = math.prod(entry.shape), _loaded(tensor, config)
    bits = BITS.get(dtype, 32)
    width = max(bits // 8, _LEAST_BYTES)
    moved = wants_tokenizer(config) and tensor.weight.vocabulary_axis is not None
    models = max(1, sum(model != tensor.group.base for model in tensor.found))
    inputs = dequantising = 0
    for model, header in _inputs(tensor):
        if isinstance(header, QuantisedHeader):  # one at a time
            dequantising = _DEQUANTISED * size
        as_stored = header.file is not None and (header.dtype, header.shape) == (dtype, entry.shape)
        if header.file is None and model.lora is not None:
            inputs += _ADAPTED * size * width
        elif not as_stored or moved or device != "cpu":
            inputs += header.nbytes + size * bits // 8
    # What is scaled afterwards is a copy, when others are no longer held.
    copies = max(copies_of(inventory.method)(models, square_of(entry.shape)), float(scaled))
    threads = torch.get_num_threads() if device == "cpu" else 1
    merging = working(copies, size * width, models, chunk_length(device) * width, threads)
    parts = {"inputs that are not mapped": inputs, "the result": entry.nbytes, **merging}
    parts |= {"a tensor that is dequantised": dequantising} if dequantising else {}
    return Need(tensor.name, parts, _REMEDY)


def predicted(located: Iterable[PlannedTensor], config: Any) -> dict[str, TensorHeader | None]:
    """Return what will be written, by name; None for tensors that no header determines."""
    built = wants_tokenizer(config)
    found: dict[str, TensorHeader | None] = {}
    for tensor in located:
        # A tokenizer that is built decides the vocabulary; and what some inputs lack may be left
        # out.
        unknown = not tensor.headers or len(tensor.headers) < len(tensor.found) or tensor.missing
        entry = None
        if not unknown and not (built and tensor.weight.vocabulary_axis is not None):
            entry = _entry(tensor, config, min)
        found[tensor.name] = entry if entry and entry.dtype in _DTYPES else None
    return found


def _entry(
    tensor: PlannedTensor, config: Any, rows: Callable[[Sequence[int]], int]
) -> TensorHeader:
    """Return what is written; `rows` makes one size of those of the inputs' vocabularies."""
    made = dtype_of(tensor.weight.force_dtype or config.out_dtype)
    dtype = _loaded(tensor, config) if made is None else dtype_name(made)
    shape, axis = list(tensor.headers[0].shape), tensor.weight.vocabulary_axis
    if axis is not None and axis < len(shape):
        shape[axis] = rows([h.shape[axis] for h in tensor.headers if axis < len(h.shape)])
    size = math.prod(shape) * BITS.get(dtype, 32) // 8
    return TensorHeader(tensor.name, dtype, tuple(shape), size)


def _loaded(tensor: PlannedTensor, config: Any) -> str:
    """Return the format's name of the dtype that mergekit loads in: what holds all inputs."""
    forced = dtype_of(tensor.weight.force_dtype or config.dtype)
    if forced is not None:
        return dtype_name(forced)
    names = [header.dtype for header in tensor.headers]
    if not all(name in _DTYPES for name in names):
        return max(names, key=lambda name: BITS.get(name, 32))
    return dtype_name(functools.reduce(torch.promote_types, [_DTYPES[name] for name in names]))


def pickled_bytes(models: Iterable[Any], options: Any) -> int:
    """Return what loaders hold of pickles: of each model the largest file.

    Models with adapters on one base share its loader; with `lazy_unpickle` single tensors are read.
    """
    if options.lazy_unpickle:
        return 0
    folders = [(folder, weights_of(folder)) for folder in _folders(models, options)]
    return sum(
        max((file.stat().st_size for file in folder.glob("*.bin")), default=0)
        for folder, weights in folders
        if weights is not None and "safetensors" not in weights.name
    )


def _folders(models: Iterable[Any], options: Any) -> set[Path]:
    found = (local_folder(model.model, options) for model in models)
    return {folder for folder in found if folder is not None}
