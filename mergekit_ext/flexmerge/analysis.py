"""The one pass over the inputs: inner products per block, and what trimming keeps of each model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.errors import NonFiniteError
from mergekit_ext.flexmerge.algorithms.base import Algorithm, Cuts, deltas_of
from mergekit_ext.flexmerge.algorithms.trimming import trimmed_deltas
from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.kernels.numerics import compute_dtype, count_non_finite
from mergekit_ext.kernels.selection import EVERYTHING, Cut, CutSearch
from mergekit_ext.kernels.similarity import Gram, cosines
from mergekit_ext.kernels.ties import kept

# More than any model has: a model's cut keeps every entry at its edge.
ALL_TIES = 1 << 62
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
    parts = [part for block in layout.blocks for part in block.parts]
    stored = {dtype for part in parts for dtype in (part.base_dtype, *part.dtypes)}
    # Sixteen bits of the threshold a pass (`kernels.selection`), the first with the products.
    return 4 if torch.float64 in stored else 2


def analyse(
    reader: BlockReader,
    densities: Sequence[float] | None = None,
    progress: Progress = lambda name: None,
) -> Analysis:
    """Measure every block.

    Args:
        reader: reads blocks of the base and the models.
        densities: for each task the share of its whole model that trimming keeps; None for no
            trimming. Exact, which takes one pass more over the inputs (three in float64).
        progress: called after each block of each pass.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
    """
    layout = reader.layout
    grams: dict[str, Tensor] = {}
    counter = _Counter(layout, densities)
    for block in layout.blocks:
        data = reader.read(block)
        gram = Gram(len(layout.tasks))
        gram.add(list(data.models.values()), data.base)
        if not bool(torch.isfinite(gram.value).all()):
            raise_non_finite(data, layout)
        grams[block.name] = gram.value
        counter.add(data)
        progress(block.name)
    counter.advance()
    while not counter.done:
        for block in layout.blocks:
            counter.add(reader.read(block))
            progress(block.name)
        counter.advance()
    cuts = {} if densities is None else {tuple(densities): counter.cuts}
    return Analysis(layout.tasks, grams, cuts)


def trimmed_grams(
    reader: BlockReader,
    algorithm: Algorithm,
    cuts: Cuts | None,
    progress: Progress = lambda name: None,
) -> dict[str, Tensor]:
    """Inner products of trimmed task vectors (`similarity_on: trimmed`)."""
    members = range(len(reader.layout.tasks))
    grams = {}
    for block in reader.layout.blocks:
        gram = Gram(len(members))
        gram.add(trimmed_deltas(reader.read(block), members, algorithm, cuts))
        grams[block.name] = gram.value
        progress(block.name)
    return grams


def raise_non_finite(data: BlockData, layout: Layout) -> None:
    """Name the first tensor and model that hold NaN or infinity.

    Raises:
        NonFiniteError: an input is not finite.
        MergeError: only products left the range of float64.
    """
    owners = [("the base model", data.base), *zip(layout.tasks, data.models.values(), strict=True)]
    for owner, vector in owners:
        for index, part in enumerate(data.layout.parts):
            tensor = data.part(vector, index)
            if count := count_non_finite(tensor):
                raise NonFiniteError(part.name, owner, count, tensor.numel())
    raise NonFiniteError(
        data.layout.name, "(differences of all)", data.layout.size, data.layout.size
    )


class _Counter:
    """Finds what trimming keeps of each whole model, a digit a pass."""

    def __init__(self, layout: Layout, densities: Sequence[float] | None):
        size = sum(block.size for block in layout.blocks)
        self._size = size
        self._densities = densities or ()
        self._searches: list[CutSearch | None] = []

    def add(self, data: BlockData) -> None:
        if not self._densities:
            return
        dtype = compute_dtype([data.base, *data.models.values()])
        if not self._searches:
            self._searches = [
                CutSearch(kept(density, self._size), dtype) if density < 1 else None
                for density in self._densities
            ]
        for member, search in enumerate(self._searches):
            if search is not None and not search.done:
                (delta,) = deltas_of(data, [member])
                search.add(delta)

    def advance(self) -> None:
        for search in self._searches:
            if search is not None and not search.done:
                search.advance()

    @property
    def done(self) -> bool:
        return all(search is None or search.done for search in self._searches)

    @property
    def cuts(self) -> Cuts:
        # All entries of the magnitude at the edge are kept, as in the authors' code: which of
        # them come first would depend on the order of the blocks.
        return [
            EVERYTHING if search is None else Cut(search.cut.pattern, ALL_TIES)
            for search in self._searches
        ]
