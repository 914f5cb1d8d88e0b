"""The one pass over the inputs: inner products per block, and what trimming keeps of each model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts, trimmed_deltas
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.notes import Notes
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.flexmerge.trim_search import Counts, TrimSearch, widest
from mergekit_ext.kernels.numerics import count_non_finite
from mergekit_ext.kernels.similarity import Gram, cosines
from mergekit_ext.parallel.ranks import Ranks

# Told the name of each block that is done.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Analysis:
    """What is known of m models after one pass.

    Attributes:
        tasks: their names.
        grams: for each block the (m, m) float64 inner products of its task vectors.
        cuts: for each density asked for, the cut that trims each task's whole model.
    """

    tasks: tuple[str, ...]
    grams: Mapping[str, Tensor]
    cuts: Mapping[tuple[float, ...], Cuts]

    def cosines(self, block: str) -> Tensor:
        """Similarities of the task vectors of one block."""
        return cosines(self.grams[block])

    def norms(self, block: str) -> list[float]:
        """Norms of the task vectors of one block."""
        return [math.sqrt(value) for value in self.grams[block].diagonal().tolist()]


def passes(layout: Layout, densities: Sequence[float] | None) -> int:
    """How many times `analyse` reads the inputs."""
    if densities is None or all(density >= 1 for density in densities):
        return 1
    # Sixteen bits of the threshold a pass (`kernels.selection`), the first with the products.
    return widest(layout).itemsize // 2


def analyse(
    reader: BlockReader,
    densities: Sequence[float] | None = None,
    progress: Progress = lambda name: None,
    notes: Notes | None = None,
    ranks: Ranks | None = None,
) -> Analysis:
    """Measure every block.

    Args:
        reader: reads blocks of the base and the models.
        densities: for each task the share of its whole model that trimming keeps; None for no
            trimming. Exact, which takes one pass more over the inputs (three in float64).
        progress: called after each block of each pass, in the process that did it.
        notes: what is measured already. Their subject is what the inputs are.
        ranks: the processes that share out the blocks, all of which call this.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
    """
    notes, ranks = notes or Notes(), ranks or Ranks()
    layout = reader.layout
    blocks = own_blocks(layout, ranks)
    # As lists: a small tensor for each block would keep the memory of large ones, freed around it,
    # from being used again.
    rows: dict[str, list[list[float]]] = {}
    search = TrimSearch(layout, densities)
    for block in blocks:
        visit = _Visit(reader, block, notes)
        rows[block.name] = visit.gram().tolist()
        if not search.done:
            search.add(visit.counts(search, densities or ()))
        progress(block.name)
    search.advance(ranks)
    while not search.done:
        for block in blocks:
            search.add(_Visit(reader, block, notes).counts(search, densities or ()))
            progress(block.name)
        search.advance(ranks)
    cuts = {} if densities is None else {tuple(densities): search.cuts}
    grams = {name: torch.tensor(gram, dtype=torch.float64) for name, gram in rows.items()}
    return Analysis(layout.tasks, gathered(grams, layout, ranks), cuts)


def trimmed_grams(
    reader: BlockReader,
    algorithm: Algorithm,
    cuts: Cuts | None,
    progress: Progress = lambda name: None,
    notes: Notes | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Inner products of trimmed task vectors (`similarity_on: trimmed`).

    Arguments as of `analyse`; the subject of `notes` says how they are trimmed, too.
    """
    notes, ranks = notes or Notes(), ranks or Ranks()
    members = range(len(reader.layout.tasks))
    grams = {}
    for block in own_blocks(reader.layout, ranks):
        rows = notes.found("trimmed gram", block.name, partial(_are_rows, size=len(members)))
        if rows is None:
            gram = Gram(len(members))
            gram.add(trimmed_deltas(reader.read(block), members, algorithm.parameters, cuts))
            rows = gram.value.tolist()
            notes.add("trimmed gram", block.name, rows)
        grams[block.name] = torch.tensor(rows, dtype=torch.float64)
        progress(block.name)
    return gathered(grams, reader.layout, ranks)


def own_blocks(layout: Layout, ranks: Ranks) -> list[BlockLayout]:
    """The blocks that this process measures."""
    tasks = range(len(layout.tasks))
    owners = ranks.share([block.bytes(tasks) for block in layout.blocks])
    return [b for b, owner in zip(layout.blocks, owners, strict=True) if owner == ranks.rank]


def gathered(grams: Mapping[str, Tensor], layout: Layout, ranks: Ranks) -> dict[str, Tensor]:
    """Those of all processes, in the order of the blocks."""
    found = {name: gram for part in ranks.gather(grams) for name, gram in part.items()}
    return {block.name: found[block.name] for block in layout.blocks}


def _are_rows(value: Any, size: int) -> bool:
    """Whether these are inner products of `size` task vectors, as they are noted."""
    return (
        isinstance(value, list)
        and len(value) == size
        and all(isinstance(row, list) and len(row) == size for row in value)
        and all(type(item) is float and math.isfinite(item) for row in value for item in row)
    )


class _Visit:
    """One block in one pass: read if something of it is not noted yet."""

    def __init__(self, reader: BlockReader, block: BlockLayout, notes: Notes):
        self._reader, self._block, self._notes = reader, block, notes
        self._read: BlockData | None = None

    def gram(self) -> Tensor:
        """Inner products of the block's task vectors.

        Raises:
            NonFiniteError: an input is not finite.
        """
        size = len(self._reader.layout.tasks)
        rows = self._notes.found("gram", self._block.name, partial(_are_rows, size=size))
        if rows is not None:
            return torch.tensor(rows, dtype=torch.float64)
        gram = Gram(size)
        gram.add(list(self._data.models.values()), self._data.base)
        if not bool(torch.isfinite(gram.value).all()):
            raise_non_finite(self._data, self._reader.layout)
        self._notes.add("gram", self._block.name, gram.value.tolist())
        return gram.value

    def counts(self, search: TrimSearch, densities: Sequence[float]) -> Counts:
        """What `search` counts in this pass. After the first it depends on the densities."""
        told = list(densities) if search.passes else [density < 1 for density in densities]
        key = json.dumps([self._block.name, search.passes, told])
        found: Counts | None = self._notes.found("counts", key, search.takes)
        if found is None:
            found = search.count(self._data)
            self._notes.add("counts", key, found)
        return found

    @property
    def _data(self) -> BlockData:
        if self._read is None:
            self._read = self._reader.read(self._block)
        return self._read


def raise_non_finite(data: BlockData, layout: Layout) -> None:
    """Name the first tensor and model that hold NaN or infinity.

    Raises:
        NonFiniteError: an input is not finite.
        MergeError: only differences or their products left the range.
    """
    owners = [("the base model", data.base), *zip(layout.tasks, data.models.values(), strict=True)]
    for owner, vector in owners:
        for index, part in enumerate(data.layout.parts):
            tensor = data.part(vector, index)
            if count := count_non_finite(tensor):
                raise NonFiniteError(part.name, owner, count, tensor.numel())
    raise MergeError(
        f"{data.layout.name}: differences from the base model leave the range of the arithmetic, "
        "although all weights are finite. Take out the model with such large weights."
    )
