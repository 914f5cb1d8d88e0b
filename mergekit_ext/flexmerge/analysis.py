"""Read the inputs: inner products of each block, and what trimming keeps of each model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts, trimmed_deltas
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.flexmerge.trim_search import Counts, TrimSearch, widest
from mergekit_ext.io.journal import Finished
from mergekit_ext.kernels.numerics import count_non_finite
from mergekit_ext.kernels.similarity import Gram, cosines
from mergekit_ext.parallel import Ranks

# Called with the name of each block that is done.
Progress = Callable[[str], None]
# Inner products as lists: a small tensor for each block would keep the memory of large ones, freed
# around it, from being used again.
Rows = list[list[float]]


@dataclass(frozen=True)
class Analysis:
    """What is known of m models.

    Attributes:
        tasks: their names.
        grams: for each block the (m, m) float64 inner products of its task vectors.
        cuts: for each density asked for, the cut that trims each task's whole model.
    """

    tasks: tuple[str, ...]
    grams: Mapping[str, Tensor]
    cuts: Mapping[tuple[float, ...], Cuts]

    def cosines(self, block: str) -> Tensor:
        """Return the similarities of the task vectors of one block."""
        return cosines(self.grams[block])

    def norms(self, block: str) -> list[float]:
        """Return the norms of the task vectors of one block."""
        return [math.sqrt(value) for value in self.grams[block].diagonal().tolist()]


def passes(layout: Layout, densities: Sequence[float] | None) -> int:
    """Return how many times `analyse` reads the inputs."""
    if densities is None or all(density >= 1 for density in densities):
        return 1
    # Sixteen bits of the threshold a pass (`kernels.selection`), the first with the products.
    return widest(layout).itemsize // 2


def analyse(
    reader: BlockReader,
    densities: Sequence[float] | None = None,
    progress: Progress = lambda name: None,
    finished: Finished | None = None,
    ranks: Ranks | None = None,
) -> Analysis:
    """Measure every block.

    Args:
        reader: reads blocks of the base and the models.
        densities: for each task the share of its whole model that trimming keeps; None for no
            trimming. Exact, which takes one pass more over the inputs (three in float64).
        progress: called after each block of each pass, in the process that did it.
        finished: what is measured already. Its subject is what the inputs are.
        ranks: the processes that share out the blocks, all of which call this.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
    """
    finished, ranks = finished or Finished(), ranks or Ranks()
    layout = reader.layout
    blocks = _own_blocks(layout, ranks)
    rows: dict[str, Rows] = {}
    search = TrimSearch(layout, densities)
    first = True
    while first or not search.done:
        for block in blocks:
            read = cache(partial(reader.read, block))
            if first:
                rows[block.name] = _rows(finished, "gram", block, partial(_gram, read, layout))
            if not search.done:
                make = partial(_counts, read, search)
                counts = finished.get("counts", search.key(block.name), search.takes, make)
                search.add(counts)
            progress(block.name)
        search.advance(ranks)
        first = False
    cuts = {} if densities is None else {tuple(densities): search.cuts}
    return Analysis(layout.tasks, _gathered(rows, layout, ranks), cuts)


def trimmed_grams(
    reader: BlockReader,
    algorithm: Algorithm,
    cuts: Cuts | None,
    progress: Progress = lambda name: None,
    finished: Finished | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Return inner products of trimmed task vectors (`similarity_on: trimmed`).

    Arguments as of `analyse`; the subject of `finished` says how they are trimmed, too.
    """
    finished, ranks = finished or Finished(), ranks or Ranks()
    rows = {}
    for block in _own_blocks(reader.layout, ranks):
        make = partial(_trimmed_gram, reader, block, algorithm, cuts)
        rows[block.name] = _rows(finished, "trimmed gram", block, make)
        progress(block.name)
    return _gathered(rows, reader.layout, ranks)


def _own_blocks(layout: Layout, ranks: Ranks) -> list[BlockLayout]:
    """Return the blocks that this process measures."""
    tasks = range(len(layout.tasks))
    owners = ranks.share([block.bytes(tasks) for block in layout.blocks])
    return [b for b, owner in zip(layout.blocks, owners, strict=True) if owner == ranks.rank]


def _gathered(rows: Mapping[str, Rows], layout: Layout, ranks: Ranks) -> dict[str, Tensor]:
    """Return those of all processes, in the order of the blocks."""
    found = {name: gram for part in ranks.gather(rows) for name, gram in part.items()}
    names = [block.name for block in layout.blocks]
    return {name: torch.tensor(found[name], dtype=torch.float64) for name in names}


def _rows(finished: Finished, kind: str, block: BlockLayout, make: Callable[[], Rows]) -> Rows:
    size = len(block.parts[0].dtypes)
    rows: Rows = finished.get(kind, block.name, partial(_are_rows, size=size), make)
    return rows


def _are_rows(value: Any, size: int) -> bool:
    """Return whether these are inner products of `size` task vectors, as they are recorded."""
    return (
        isinstance(value, list)
        and len(value) == size
        and all(isinstance(row, list) and len(row) == size for row in value)
        and all(type(item) is float and math.isfinite(item) for row in value for item in row)
    )


def _gram(read: Callable[[], BlockData], layout: Layout) -> Rows:
    data = read()
    gram = Gram(len(layout.tasks))
    gram.add(list(data.models.values()), data.base)
    if not bool(torch.isfinite(gram.value).all()):
        _raise_non_finite(data, layout)
    rows: Rows = gram.value.tolist()
    return rows


def _trimmed_gram(
    reader: BlockReader, block: BlockLayout, algorithm: Algorithm, cuts: Cuts | None
) -> Rows:
    members = range(len(reader.layout.tasks))
    gram = Gram(len(members))
    gram.add(trimmed_deltas(reader.read(block), members, algorithm.parameters, cuts))
    rows: Rows = gram.value.tolist()
    return rows


def _counts(read: Callable[[], BlockData], search: TrimSearch) -> Counts:
    return search.count(read())


def _raise_non_finite(data: BlockData, layout: Layout) -> None:
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
