"""What a FlexMerge holds at its worst moment: one block of all models, and what merges it.

Or, beside the room for blocks, private tensors that are copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from mergekit_ext.flexmerge.finite import EIGHT_BITS
from mergekit_ext.flexmerge.layout import BlockLayout, Layout, Part
from mergekit_ext.flexmerge.trim_search import widest
from mergekit_ext.host.checks.pickled import pickled_bytes
from mergekit_ext.kernels.footprint import Work, largest
from mergekit_ext.memory import Need

if TYPE_CHECKING:
    from mergekit_ext.host.flexmerge.prepare import Prepared

_REMEDY = (
    "Take smaller blocks (`granularity: tensor`), fewer models, or an `algorithm` that works in "
    "pieces: task_arithmetic, average, ties."
)
_PRIVATE = "Merge fewer models, or leave out those whose tensors have other shapes than the base's."
# Pieces of similarities and of counts.
_PIECES = 16 << 20
# Bytes of an entry in float32, and of what tells whether it is finite.
_WIDE, _MASKS = 4, 3


def need_of(prepared: Prepared, options: Any) -> Need:
    """Of the block, or of the private tensor, that needs the most, from headers alone."""
    device = str(options.device).partition(":")[0]
    needs = [_of_block(block, prepared, device) for block in prepared.layout.blocks]
    needs += _of_private(prepared, device)
    need = max(needs, key=lambda need: max(need.bytes, need.device_bytes))
    pickles = pickled_bytes([prepared.base, *prepared.models], options)
    return replace(need, parts={**need.parts, "whole pickles": pickles})


def with_models(need: Need, layout: Layout, size: float, forced: torch.dtype | None) -> Need:
    """The same for models that stay in memory at a size, as `sizes` has them to score."""
    tasks = range(len(layout.tasks))
    model = sum(block.bytes(tasks, forced) for block in layout.blocks)
    # What is kept of the size before lives on until a block has changed.
    merged = math.ceil(model * min(size, len(layout.tasks)))
    parts = {**need.parts, "merged models": merged, "the model that is scored": 2 * model}
    return Need(need.what, parts, need.device, f"Ask for smaller sizes. {need.remedy}")


def _of_block(block: BlockLayout, prepared: Prepared, device: str) -> Need:
    layout, forced, algorithm = prepared.layout, prepared.forced, prepared.written.algorithm
    tasks = range(len(layout.tasks))
    wide = widest(layout)
    read = _read(block, layout)
    out = forced or block.dtype(tasks)

    def work(shape: tuple[int, ...], layout: str) -> Work:
        threads = torch.get_num_threads() if device == "cpu" else 1
        return Work(shape, len(tasks), True, wide.itemsize, out.itemsize, layout, threads, device)

    whole = work((block.size,), "matrix")
    parts = [work(part.shape, part.matrices) for part in block.parts]
    scratch = algorithm.scratch(whole, parts)
    if prepared.written.shared["similarity_on"] == "trimmed":
        deltas = (whole.models + 5) * whole.unit
        scratch = {**scratch, "trimmed task vectors": deltas}
    copies = 2 * max((_bytes(part, out) for part in block.parts), default=0)
    narrow = 0 if all(_as_read(part, read) for part in block.parts) else copies
    held = {"the block of all models": (whole.models + 1) * block.size * read.itemsize}
    reading = {"reading and writing": _PIECES + copies + narrow}
    adapted = [_adapted(part) for part in block.parts if part.name in prepared.adapted]
    adapting = {"a tensor with its adapter": max(adapted, default=0)}
    name = f"block {block.name}"
    if device == "cpu":  # what is adapted is read before anything is merged
        return Need(name, {**held, **reading, **largest([scratch, adapting])}, {}, _REMEDY)
    one = {"a block of one model": block.size * read.itemsize}
    on_device = {**held, **largest([scratch, adapting])}
    return Need(name, {**one, **reading, **adapting}, on_device, _REMEDY)


def _of_private(prepared: Prepared, device: str) -> Iterator[Need]:
    """Of each tensor that is copied, while the room for blocks is kept."""
    layout = prepared.layout
    vectors = len(layout.tasks) + 1 if device == "cpu" else 1
    room = max(block.size * _read(block, layout).itemsize for block in layout.blocks)
    for header in itertools.chain.from_iterable(layout.private):
        count = math.prod(header.shape)
        wide = count * _WIDE if header.dtype in EIGHT_BITS else 0
        changed = count * (2 * _WIDE + _MASKS) if header.name in prepared.adapted else 0
        parts = {
            "the room for blocks": vectors * room,
            "a private tensor, and the one before": 2 * header.nbytes + _PIECES,
            "the same in the arithmetic": max(wide, changed),
        }
        yield Need(f"private tensor {header.name}", parts, {}, _PRIVATE)


def _adapted(part: Part) -> int:
    """Bytes of a tensor in the arithmetic, before and after, and of whether it is finite."""
    wide = max(_WIDE, *(dtype.itemsize for dtype in part.dtypes))
    return math.prod(part.shape) * (2 * wide + _MASKS)


def _read(block: BlockLayout, layout: Layout) -> torch.dtype:
    """The dtype of the vectors that a block is read into."""
    if widest(layout) == torch.float64:
        return torch.float64
    tasks = range(len(layout.tasks))
    return _promoted([block.dtype(tasks), *(part.base_dtype for part in block.parts)])


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _bytes(part: Part, out: torch.dtype) -> int:
    return math.prod(part.shape) * max(out.itemsize, *(dtype.itemsize for dtype in part.dtypes))


def _as_read(part: Part, read: torch.dtype) -> bool:
    return all(dtype == read for dtype in (part.base_dtype, *part.dtypes))
