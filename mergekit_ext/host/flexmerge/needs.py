"""What a FlexMerge holds at its worst moment: one block of all models, and what merges it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from mergekit_ext.flexmerge.algorithms.base import Algorithm
from mergekit_ext.flexmerge.layout import BlockLayout, Layout, Part
from mergekit_ext.flexmerge.trim_search import widest
from mergekit_ext.kernels.footprint import Work
from mergekit_ext.memory import Need

if TYPE_CHECKING:
    from mergekit_ext.host.flexmerge.prepare import Prepared

_REMEDY = (
    "Take smaller blocks (`granularity: tensor`), fewer models, or an `algorithm` that works in "
    "pieces: task_arithmetic, average, ties."
)
# Pieces of similarities and of counts.
_PIECES = 16 << 20


def need_of(prepared: Prepared, options: Any) -> Need:
    """Of the block that needs the most, from headers alone."""
    layout, device = prepared.layout, str(options.device).partition(":")[0]
    trimmed = prepared.written.shared["similarity_on"] == "trimmed"
    each = [
        _of_block(block, layout, prepared.written.algorithm, prepared.forced, device, trimmed)
        for block in layout.blocks
    ]
    return max(each, key=lambda need: max(need.bytes, need.device_bytes))


def with_models(need: Need, layout: Layout, size: float, forced: torch.dtype | None) -> Need:
    """The same for models that stay in memory at a size, as `sizes` has them to score."""
    tasks = range(len(layout.tasks))
    model = sum(block.bytes(tasks, forced) for block in layout.blocks)
    # What is kept of the size before lives on until a block has changed.
    merged = math.ceil(model * min(size, len(layout.tasks)))
    parts = {**need.parts, "merged models": merged, "the model that is scored": 2 * model}
    return Need(need.what, parts, need.device, f"Ask for smaller sizes. {need.remedy}")


def _of_block(
    block: BlockLayout,
    layout: Layout,
    algorithm: Algorithm,
    forced: torch.dtype | None,
    device: str,
    trimmed: bool,
) -> Need:
    tasks = range(len(layout.tasks))
    wide = widest(layout)
    stored = _promoted([block.dtype(tasks), *(part.base_dtype for part in block.parts)])
    read = wide if wide == torch.float64 else stored
    out = forced or block.dtype(tasks)

    def work(shape: tuple[int, ...], layout: str) -> Work:
        threads = torch.get_num_threads() if device == "cpu" else 1
        return Work(shape, len(tasks), True, wide.itemsize, out.itemsize, layout, threads, device)

    whole = work((block.size,), "matrix")
    parts = [work(part.shape, part.matrices) for part in block.parts]
    scratch = algorithm.scratch(whole, parts)
    if trimmed:
        deltas = (whole.models + 5) * whole.unit
        scratch = {**scratch, "trimmed task vectors": deltas}
    copies = 2 * max((_bytes(part, out) for part in block.parts), default=0)
    narrow = 0 if all(_as_read(part, read) for part in block.parts) else copies
    held = {"the block of all models": (whole.models + 1) * block.size * read.itemsize}
    reading = {"reading and writing": _PIECES + copies + narrow}
    name = f"block {block.name}"
    if device == "cpu":
        return Need(name, {**held, **reading, **scratch}, {}, _REMEDY)
    one = {"a block of one model": block.size * read.itemsize}
    return Need(name, {**one, **reading}, {**held, **scratch}, _REMEDY)


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _bytes(part: Part, out: torch.dtype) -> int:
    return math.prod(part.shape) * max(out.itemsize, *(dtype.itemsize for dtype in part.dtypes))


def _as_read(part: Part, read: torch.dtype) -> bool:
    return all(dtype == read for dtype in (part.base_dtype, *part.dtypes))
