"""What trimming keeps of whole models, found block by block, by any number of processes."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithm import Cuts, deltas_of
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.source import BlockData
from mergekit_ext.kernels.numerics import chunks
from mergekit_ext.kernels.selection import EVERYTHING, Cut, CutSearch
from mergekit_ext.kernels.ties import kept
from mergekit_ext.parallel import Ranks

# More than any model has: a model's cut keeps every entry at its edge.
ALL_TIES = 1 << 62
# For each model what `packed` makes of one block's counts; None for a model that is not trimmed.
Counts = list[str | None]


def widest(layout: Layout) -> torch.dtype:
    """Return the dtype that task vectors are formed in, the same in every block."""
    parts = [part for block in layout.blocks for part in block.parts]
    stored = {dtype for part in parts for dtype in (part.base_dtype, *part.dtypes)}
    return torch.float64 if torch.float64 in stored else torch.float32


class TrimSearch:
    """Finds the cut of each model, a digit a pass; see `kernels.selection`.

    Args:
        layout: of the models.
        densities: for each model the share that is kept; None or 1 everywhere to find nothing.

    Attributes:
        passes: how many passes are over.
    """

    def __init__(self, layout: Layout, densities: Sequence[float] | None):
        size, dtype = sum(block.size for block in layout.blocks), widest(layout)
        self.passes, self._densities = 0, list(densities or ())
        self._searches = [
            CutSearch(kept(density, size), dtype) if density < 1 else None
            for density in densities or ()
        ]

    @property
    def done(self) -> bool:
        """Whether `cuts` are known."""
        return all(search is None or search.done for search in self._searches)

    def count(self, data: BlockData) -> Counts:
        """Count one block in this pass; it counts when it is given to `add`."""
        return [
            None if search is None else packed(_counted(search, data, member))
            for member, search in enumerate(self._searches)
        ]

    def key(self, block: str) -> str:
        """Return what names a block's counts: after the first pass they depend on densities."""
        given = self._densities if self.passes else [density < 1 for density in self._densities]
        return json.dumps([block, self.passes, given])

    def takes(self, counts: Any) -> bool:
        """Return whether `count` may have found this, and `add` can take it in."""
        return (
            isinstance(counts, list)
            and len(counts) == len(self._searches)
            and all(isinstance(found, (str, type(None))) for found in counts)
        )

    def add(self, counts: Counts) -> None:
        """Take in what `count` found of a block."""
        for search, found in zip(self._searches, counts, strict=True):
            if search is not None and found is not None:
                search.take(unpacked(found, search.bins))

    def advance(self, ranks: Ranks) -> None:
        """End a pass, in all processes, with what all of them have taken in."""
        if self.done:
            return
        own = [None if s is None else packed(s.taken) for s in self._searches]
        for rank, counts in enumerate(ranks.gather(own)):
            if rank != ranks.rank:
                self.add(counts)
        for search in self._searches:
            if search is not None:
                search.advance()
        self.passes += 1

    @property
    def cuts(self) -> Cuts:
        """What is kept of each model.

        All entries of the magnitude at the edge are, as in the authors' code: which of them come
        first would depend on the order of the blocks.
        """
        return [
            EVERYTHING if search is None else Cut(search.cut.pattern, ALL_TIES)
            for search in self._searches
        ]


def _counted(search: CutSearch, data: BlockData, member: int) -> Tensor:
    """Return what `search` counts of a task vector, which is formed in pieces."""
    total = torch.zeros(search.bins, dtype=torch.int64, device=data.base.device)
    for part in chunks(data.base):
        models = {member: data.models[member][part]}
        piece = BlockData(data.layout, data.base[part], models)
        total.add_(search.count(*deltas_of(piece, [member])))
    return total


def packed(counts: Tensor) -> str:
    """Return counts, most of which are 0, as text."""
    counts = counts.cpu()
    filled = counts.nonzero().view(-1)
    steps = filled.diff(prepend=filled.new_zeros(1))  # small numbers, which compress well
    content = torch.stack((steps, counts[filled])).numpy().tobytes()
    return base64.b64encode(zlib.compress(content, 1)).decode("ascii")


def unpacked(text: str, size: int) -> Tensor:
    """Return the counts that `packed` was given, as many as `size`."""
    content = bytearray(zlib.decompress(base64.b64decode(text)))
    counts = torch.zeros(size, dtype=torch.int64)
    if content:
        steps, found = torch.frombuffer(content, dtype=torch.int64).view(2, -1)
        counts[steps.cumsum(0)] = found
    return counts
