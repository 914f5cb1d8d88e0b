"""What a FlexMerge holds at its worst moment: one block of all models, and what merges it.

Or, beside the vectors of a block, private tensors that are copied. See `memory` for the rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from mergekit_ext.core.memory import Need, square_of, working
from mergekit_ext.flexmerge.finite import EIGHT_BITS
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.trim_search import widest
from mergekit_ext.host.checks.estimate import pickled_bytes
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


def need_of(prepared: Prepared, options: Any) -> Need:
    """Return the need of the block or private tensor that needs the most, from headers alone."""
    device = str(options.device).partition(":")[0]
    needs = [_of_block(block, prepared, device) for block in prepared.layout.blocks]
    need = max([*needs, *_of_private(prepared, device)], key=lambda need: need.most)
    pickles = pickled_bytes([prepared.base, *prepared.models], options)
    return replace(need, parts={**need.parts, "whole pickles": pickles})


def with_models(need: Need, layout: Layout, size: float, forced: torch.dtype | None) -> Need:
    """Return the need with models in memory at a size, as `sizes` has them to score."""
    tasks = range(len(layout.tasks))
    model = sum(block.bytes(tasks, forced) for block in layout.blocks)
    # What is kept of the size before lives on until a block has changed.
    merged = math.ceil(model * min(size, len(layout.tasks)))
    parts = {**need.parts, "merged models": merged, "the model that is scored": 2 * model}
    return Need(need.what, parts, need.device, f"Ask for smaller sizes. {need.remedy}")


def _of_block(block: BlockLayout, prepared: Prepared, device: str) -> Need:
    layout, algorithm = prepared.layout, prepared.written.algorithm
    count, width = len(layout.tasks), widest(layout).itemsize
    out = (prepared.forced or block.dtype(range(count))).itemsize
    sizes = {part.name: math.prod(part.shape) for part in block.parts}
    largest = max(block.parts, key=lambda part: sizes[part.name])

    unit, square, beside = block.size, 0.0, 0.0
    if algorithm.by_tensor:  # the block's task vectors and its result are held beside one tensor
        unit, square, beside = sizes[largest.name], square_of(largest.shape), count + 3
    if prepared.written.shared["similarity_on"] == "trimmed":
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


def _of_private(prepared: Prepared, device: str) -> Iterator[Need]:
    """Yield the need of each tensor that is copied, beside the vectors of the largest block."""
    layout = prepared.layout
    vectors = len(layout.tasks) + 1 if device == "cpu" else 1
    largest = max(block.size * _read(block, layout).itemsize for block in layout.blocks)
    for header in itertools.chain.from_iterable(layout.private):
        changed = header.dtype in EIGHT_BITS or header.name in prepared.adapted
        copies = _ADAPTED * widest(layout).itemsize if changed else 0
        parts = {
            "the block of all models": vectors * largest,
            "a private tensor, and the one before": 2 * header.nbytes + _PIECES,
            "its copies in the arithmetic": math.ceil(copies * math.prod(header.shape)),
        }
        yield Need(f"private tensor {header.name}", parts, {}, _PRIVATE)


def _read(block: BlockLayout, layout: Layout) -> torch.dtype:
    """The dtype of the vectors that a block is read into."""
    if widest(layout) == torch.float64:
        return torch.float64
    dtypes = [block.dtype(range(len(layout.tasks))), *(part.base_dtype for part in block.parts)]
    return reduce(torch.promote_types, dtypes)
