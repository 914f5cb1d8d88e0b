"""One block's tensors, merged and written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithm import Masked
from mergekit_ext.flexmerge.declared import Key, Order, names_of
from mergekit_ext.flexmerge.finite import require_in_range
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.manifest import BASE, DENSE, MASKED, MASKS, UNIFIED
from mergekit_ext.flexmerge.plan import StoredGroup
from mergekit_ext.flexmerge.shards import ShardWriter
from mergekit_ext.flexmerge.source import BlockData, BlockReader

# Below this share of a dtype's largest value no rounding leads out of its range.
_SAFE_RANGE = 0.9


def write_block(
    block: BlockLayout,
    groups: Sequence[StoredGroup],
    reader: BlockReader,
    order: Order,
    shards: ShardWriter,
) -> dict[int, float]:
    """Write what `declared.block_entries` lists, in that order.

    Returns:
        the rescaler of each task whose group is masked.

    Raises:
        MergeError: a merged tensor is not finite in its dtype.
    """
    layout = reader.layout
    shared = [task for group in groups if len(group.tasks) > 1 for task in group.tasks]
    data = reader.read(block, shared) if shared else None
    rescale: dict[int, float] = {}
    if data is not None and any(group.kind == MASKED for group in groups):
        for index, part in enumerate(block.parts):
            tensor = data.part(data.base, index).to(part.base_dtype)
            shards.write((BASE, layout.tasks), part.name, tensor)
    for group in groups:
        names = names_of(layout, group)
        if len(group.tasks) == 1:
            _copy(block, group.tasks[0], reader, order, shards)
            continue
        assert data is not None
        dtype = order.forced or block.dtype(group.tasks)
        if group.kind == DENSE:
            vector = order.algorithm.merge(data, group.tasks, dtype, order.cuts)
            _write_vector((DENSE, names), block, vector, group, order, shards)
            continue
        found = order.algorithm.merge_masked(data, group.tasks, dtype, order.cuts)
        _require_reconstructible(block, group, found, data, order)
        _write_vector((UNIFIED, names), block, found.unified, group, order, shards)
        for task in group.tasks:
            shards.write((MASKS, (layout.tasks[task],)), block.name, found.masks[task])
        rescale.update(found.rescale)
    return rescale


def _copy(
    block: BlockLayout, task: int, reader: BlockReader, order: Order, shards: ShardWriter
) -> None:
    """One task's own tensors: their very bytes, unless another dtype is asked for."""
    for part in block.parts:
        stored = reader.read_stored(task, part.name)
        dtype = part.dtypes[task]
        if order.forced is not None and order.forced != dtype:
            stored = stored.view(dtype).to(order.forced)
            require_in_range(stored, part.name)
        shards.write((DENSE, (reader.layout.tasks[task],)), part.name, stored)


def _write_vector(
    key: Key,
    block: BlockLayout,
    vector: Tensor,
    group: StoredGroup,
    order: Order,
    shards: ShardWriter,
) -> None:
    for part in block.parts:
        tensor = vector[part.slice].to(order.forced or part.dtype(group.tasks))
        require_in_range(tensor, part.name)
        shards.write(key, part.name, tensor)


def _require_reconstructible(
    block: BlockLayout, group: StoredGroup, found: Masked, data: BlockData, order: Order
) -> None:
    """The weights that readers will make of a masked group must be finite too."""
    for index, part in enumerate(block.parts):
        if not math.prod(part.shape):
            continue
        dtype = order.forced or part.dtype(group.tasks)
        base = data.part(data.base, index).abs().max()
        step = found.unified[part.slice].abs().max()
        most = float(base) + max(found.rescale.values()) * float(step)
        if most < _SAFE_RANGE * torch.finfo(dtype).max:
            continue
        for task in group.tasks:
            made = found.vector(data.base, task)[part.slice].to(dtype)
            require_in_range(made, part.name)
