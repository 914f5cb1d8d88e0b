"""What a FlexMerge reads, writes and holds, from headers alone."""

import math
from dataclasses import replace
from functools import reduce

import torch

from mergekit_ext.core.memory import Need, square_of, working
from mergekit_ext.flexmerge.analysis import passes
from mergekit_ext.flexmerge.decomposition import SMALL
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.residual import DECOMPOSING, LOW_RANK, OWN, Limit, ResidualStorage
from mergekit_ext.host.checks.estimate import pickled_bytes
from mergekit_ext.host.checks.report import Estimate
from mergekit_ext.host.flexmerge.shared_tensors import Prepared
from mergekit_ext.io.headers import NARROW
from mergekit_ext.kernels.numerics import chunk_length

_REMEDY = (
    "Take smaller blocks (`granularity: tensor`), fewer models, or an `algorithm` that works in "
    "pieces: task_arithmetic, average, ties."
)
# Pieces of similarities and of counts.
_PIECES = 16 << 20
# Copies in the arithmetic's dtype of a tensor that an adapter changes: before, after, and masks
# of what is finite.
_ADAPTED = 2.75


def estimate(prepared: Prepared) -> Estimate:
    """Return what a merge will cost; which tensors are shared is known only when it is planned."""
    layout, algorithm = prepared.layout, prepared.algorithm
    whole, tasks = prepared.storage.whole, len(layout.tasks)
    # The analysis, similarities of trimmed vectors, and the merge.
    reads = passes(layout, algorithm.densities) + 1
    if isinstance(prepared.storage, ResidualStorage) and algorithm.densities is None:
        reads -= 1  # nothing is analysed
    reads += algorithm.parameters.shared["similarity_on"] == "trimmed"
    base = sum(block.base_bytes for block in layout.blocks)
    stored = _stored(prepared)
    # A model's worth of bytes is one model.
    models = max(0, stored - layout.private_bytes) * tasks / whole
    need = need_of(prepared)
    tensors = round(models * sum(len(block.parts) for block in layout.blocks))
    if isinstance(storage := prepared.storage, ResidualStorage):  # two factors of each task
        kinds = [storage.treatment(block, part) for block in layout.blocks for part in block.parts]
        tensors = sum({LOW_RANK: 1 + 2 * tasks, OWN: tasks}.get(kind, 1) for kind in kinds)
    return Estimate(
        bytes_read=reads * (whole + base) + layout.private_bytes,
        bytes_written=stored,
        bytes_held=need.bytes,
        tensors=tensors + len(layout.copied),
        parameters=round(models * sum(block.size for block in layout.blocks))
        + sum(math.prod(header.shape) for header in layout.copied),
        need=need,
        planned=False,
    )


def _stored(prepared: Prepared) -> int:
    """Return the bytes that are written, at most."""
    layout, target, storage = prepared.layout, prepared.target, prepared.storage
    shared = prepared.algorithm.parameters.shared
    limit = Limit(rank=shared.get("rank"), energy=shared.get("energy"))
    if isinstance(storage, ResidualStorage) and limit != Limit():
        return storage.at_most(limit)
    if target.bytes is not None:
        return min(target.bytes, storage.most.bytes)
    return int((target.models or 1) * storage.whole / len(layout.tasks)) + storage.private_bytes


def need_of(prepared: Prepared, scored: float | None = None) -> Need:
    """Return the need of the block that needs the most, beside the largest tensor that is copied.

    `scored` is the size in models of what is scored in memory, beside the merge.
    """
    layout, tasks = prepared.layout, range(len(prepared.layout.tasks))
    parts = [part for block in layout.blocks for part in block.parts]
    copied = layout.copied
    shapes = {part.name: part.shape for part in parts} | {h.name: h.shape for h in copied}
    changed = {header.name for header in copied if header.dtype in NARROW} | prepared.adapted
    largest_changed = max((math.prod(shapes[n]) for n in changed if n in shapes), default=0)
    sizes = [math.prod(p.shape) * (prepared.forced or p.dtype(tasks)).itemsize for p in parts]
    sizes += [header.nbytes for header in copied]
    needs = [Need(f"block {b.name}", _merging(b, prepared), _REMEDY) for b in layout.blocks]
    need = max(needs, key=lambda need: need.bytes)
    besides = {
        "the block of all models": max(_read(block, prepared) for block in layout.blocks),
        "reading and writing": _PIECES + 4 * max(sizes),
        "a tensor with its adapter": math.ceil(_ADAPTED * largest_changed * layout.dtype.itemsize),
        "whole pickles": pickled_bytes(prepared.references, prepared.options),
    }
    if prepared.forms is not None:  # tensors, and bytes of all of them, of one at a time
        beside_base = _stored(prepared) - prepared.storage.whole // len(tasks)
        besides["an adapter"] = 2 * max(0, beside_base) // len(tasks)
    if scored is None:
        return replace(need, parts={**besides, **need.parts})
    model = sum(block.bytes(tasks, prepared.forced) for block in layout.blocks)
    # What is kept of the size before lives on until a block has changed.
    besides["merged models"] = math.ceil(model * min(scored, len(tasks)))
    besides["the model that is scored"] = 2 * model
    remedy = f"Ask for smaller sizes. {need.remedy}"
    return replace(need, parts={**besides, **need.parts}, remedy=remedy)


def _merging(block: BlockLayout, prepared: Prepared) -> dict[str, int]:
    algorithm, device = prepared.algorithm, str(prepared.options.device).partition(":")[0]
    count, width = len(prepared.layout.tasks), prepared.layout.dtype.itemsize
    unit, square, beside = block.size, 0.0, 0
    if algorithm.by_tensor:  # the block's task vectors and its result are held beside one tensor
        largest = max((part.shape for part in block.parts), key=math.prod)
        unit, square, beside = math.prod(largest), square_of(largest), count + 3
    if algorithm.parameters.shared["similarity_on"] == "trimmed":
        beside += count + 5
    threads = torch.get_num_threads() if device == "cpu" else 1
    residuals = 0
    if isinstance(prepared.storage, ResidualStorage):  # held, and as they are written
        other = (threads - 1) * DECOMPOSING * min(SMALL, block.size)
        residuals = 2 * prepared.storage.factors(block) + other
    copies, piece = algorithm.copies(count, square), chunk_length(device) * width
    return {
        "the result": block.bytes(range(count), prepared.forced),
        **working(copies, unit * width, count, piece, threads),
        "factors of all tasks, and decompositions in other threads": residuals * width,
        "task vectors of the block": beside * block.size * width,
    }


def _read(block: BlockLayout, prepared: Prepared) -> int:
    """Return the bytes of the vectors that a block of the base and of all models is read into."""
    tasks = range(len(prepared.layout.tasks))
    dtypes = [block.dtype(tasks), *(part.base_dtype for part in block.parts)]
    dtype = reduce(torch.promote_types, dtypes)
    if prepared.layout.dtype == torch.float64:
        dtype = torch.float64
    return (len(tasks) + 1) * block.size * dtype.itemsize
