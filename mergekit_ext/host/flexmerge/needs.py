"""What a FlexMerge reads, writes and holds, from headers alone: see `Estimate` and `memory`.

It holds the most with one block of all models, and what merges it; or with private tensors that
are copied, beside the vectors of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import torch

from mergekit_ext.core.memory import Need, square_of, working
from mergekit_ext.flexmerge.analysis import passes
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.merging import EIGHT_BITS
from mergekit_ext.host.checks.estimate import pickled_bytes
from mergekit_ext.host.checks.report import Estimate
from mergekit_ext.host.flexmerge.sources import Prepared
from mergekit_ext.kernels.numerics import chunk_length

_REMEDY = (
    "Take smaller blocks (`granularity: tensor`), fewer models, or an `algorithm` that works in "
    "pieces: task_arithmetic, average, ties."
)
_PRIVATE = "Merge fewer models, or leave out those whose tensors have other shapes than the base's."
# Pieces of similarities and of counts.
_PIECES = 16 << 20
# Copies in the arithmetic's dtype of a tensor that an adapter changes: before, after, and masks
# of what is finite.
_ADAPTED = 2.75


def estimate(prepared: Prepared) -> Estimate:
    """Return what a merge will cost; which tensors are shared is known only when it is planned."""
    layout, algorithm, target = prepared.layout, prepared.algorithm, prepared.target
    whole, tasks = prepared.storage.whole, len(layout.tasks)
    private = list(itertools.chain.from_iterable(layout.private))
    # The analysis, similarities of trimmed vectors, and the merge.
    reads = passes(layout, algorithm.densities) + 1
    reads += algorithm.parameters.shared["similarity_on"] == "trimmed"
    base = sum(block.base_bytes for block in layout.blocks)
    if target.bytes is not None:
        stored = min(target.bytes, whole + layout.private_bytes)
    else:
        stored = int((target.models or 1) * whole / tasks) + layout.private_bytes
    # A model's worth of bytes is one model.
    models = max(0, stored - layout.private_bytes) * tasks / whole
    need = need_of(prepared)
    return Estimate(
        bytes_read=reads * (whole + base) + layout.private_bytes,
        bytes_written=stored,
        bytes_held=need.bytes,
        tensors=round(models * sum(len(block.parts) for block in layout.blocks)) + len(private),
        parameters=round(models * sum(block.size for block in layout.blocks))
        + sum(math.prod(header.shape) for header in private),
        need=need,
    )


def need_of(prepared: Prepared, scored: float | None = None) -> Need:
    """Return the need of the block or private tensor that needs the most.

    Args:
        prepared: the merge.
        scored: the size in models of what is scored in memory, beside the merge.
    """
    layout = prepared.layout
    needs = [*(_of_block(block, prepared) for block in layout.blocks), *_of_private(prepared)]
    need = max(needs, key=lambda need: need.most)
    parts = {**need.parts, "whole pickles": pickled_bytes(prepared.references, prepared.options)}
    if scored is None:
        return replace(need, parts=parts)
    tasks = range(len(layout.tasks))
    model = sum(block.bytes(tasks, prepared.forced) for block in layout.blocks)
    # What is kept of the size before lives on until a block has changed.
    parts["merged models"] = math.ceil(model * min(scored, len(layout.tasks)))
    parts["the model that is scored"] = 2 * model
    return replace(need, parts=parts, remedy=f"Ask for smaller sizes. {need.remedy}")


def _of_block(block: BlockLayout, prepared: Prepared) -> Need:
    layout, algorithm, device = prepared.layout, prepared.algorithm, _device(prepared)
    count, width = len(layout.tasks), layout.dtype.itemsize
    out = (prepared.forced or block.dtype(range(count))).itemsize
    sizes = {part.name: math.prod(part.shape) for part in block.parts}
    largest = max(block.parts, key=lambda part: sizes[part.name])

    unit, square, beside = block.size, 0.0, 0.0
    if algorithm.by_tensor:  # the block's task vectors and its result are held beside one tensor
        unit, square, beside = sizes[largest.name], square_of(largest.shape), count + 3
    if algorithm.parameters.shared["similarity_on"] == "trimmed":
        beside += count + 5
    adapted = max((sizes[name] for name in sizes if name in prepared.adapted), default=0)
    merging = {
        "the result": block.size * out,
        **working(
            algorithm.copies(count, square),
            unit * width,
            count,
            piece=chunk_length(device) * width,
            threads=torch.get_num_threads() if device == "cpu" else 1,
        ),
        "task vectors of the block": math.ceil(beside * block.size * width),
    }
    adapting = {"a tensor with its adapter": math.ceil(_ADAPTED * adapted * width)}
    read = _read(block, layout)
    vectors = {"the block of all models": (count + 1) * block.size * read.itemsize}
    # Tensors that are copied as they are read and written: two, and converted ones.
    stored = max(out, *(dtype.itemsize for dtype in largest.dtypes))
    reading = {"reading and writing": _PIECES + 4 * sizes[largest.name] * stored, **adapting}
    name = f"block {block.name}"
    if device == "cpu":
        return Need(name, {**vectors, **reading, **merging}, {}, _REMEDY)
    one = {"a block of one model": block.size * read.itemsize}
    return Need(name, {**one, **reading}, {**vectors, **merging, **adapting}, _REMEDY)


def _of_private(prepared: Prepared) -> Iterator[Need]:
    """Yield the need of each tensor that is copied, beside the vectors of the largest block."""
    layout = prepared.layout
    vectors = len(layout.tasks) + 1 if _device(prepared) == "cpu" else 1
    largest = max(block.size * _read(block, layout).itemsize for block in layout.blocks)
    for header in itertools.chain.from_iterable(layout.private):
        changed = header.dtype in EIGHT_BITS or header.name in prepared.adapted
        copies = _ADAPTED * layout.dtype.itemsize if changed else 0
        parts = {
            "the block of all models": vectors * largest,
            "a private tensor, and the one before": 2 * header.nbytes + _PIECES,
            "its copies in the arithmetic": math.ceil(copies * math.prod(header.shape)),
        }
        yield Need(f"private tensor {header.name}", parts, {}, _PRIVATE)


def _device(prepared: Prepared) -> str:
    return str(prepared.options.device).partition(":")[0]


def _read(block: BlockLayout, layout: Layout) -> torch.dtype:
    """Return the dtype of the vectors that a block is read into."""
    if layout.dtype == torch.float64:
        return torch.float64
    dtypes = [block.dtype(range(len(layout.tasks))), *(part.base_dtype for part in block.parts)]
    return reduce(torch.promote_types, dtypes)
