"""Read the inputs: inner products of each block, and what trimming keeps of each model."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from mergekit_ext.errors import MergeError, NonFiniteError
from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts, deltas_of, trimmed_deltas
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.io.journal import Finished
from mergekit_ext.kernels.numerics import chunks, count_non_finite
from mergekit_ext.kernels.selection import EVERYTHING, Cut, CutSearch
from mergekit_ext.kernels.similarity import Gram
from mergekit_ext.kernels.ties import kept
from mergekit_ext.parallel import current

# Called with the name of each block that is done.
Progress = Callable[[str], None]
# Inner products as lists: a small tensor for each block would keep the memory of large ones, freed
# around it, from being used again.
Rows = list[list[float]]
# For each model what `_packed` makes of one block's counts; None for a model that is not trimmed.
Counts = list[str | None]
# More than any model has: a model's cut keeps every entry at its edge, as in the authors' code.
# Which of them come first would depend on the order of the blocks.
ALL_TIES = 1 << 62


@dataclass(frozen=True)
class Analysis:
    """What is known of m models.

    Attributes:
        grams: for each block the (m, m) float64 inner products of its task vectors.
        cuts: for each density asked for, the cut that trims each task's whole model.
    """

    grams: Mapping[str, Tensor]
    cuts: Mapping[tuple[float, ...], Cuts]


def passes(layout: Layout, densities: Sequence[float] | None) -> int:
    """Return how many times `analyse` reads the inputs."""
    if densities is None or all(density >= 1 for density in densities):
        return 1
    # Sixteen bits of the threshold a pass (`kernels.selection`), the first with the products.
    return layout.dtype.itemsize // 2


def analyse(
    reader: BlockReader,
    densities: Sequence[float] | None = None,
    progress: Progress = lambda name: None,
    finished: Finished | None = None,
) -> Analysis:
    """Measure every block; the processes of a merge share them out, and all call this.

    Args:
        reader: reads blocks of the base and the models.
        densities: for each task the share of its whole model that trimming keeps; None for no
            trimming. Exact, which takes one pass more over the inputs (three in float64).
        progress: called after each block of each pass, in the process that did it.
        finished: what is measured already. Its subject is what the inputs are.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
    """
    finished, layout = finished or Finished(), reader.layout
    blocks, rows = _own_blocks(layout), {}
    search = _TrimSearch(layout, densities or ())
    for number in range(passes(layout, densities)):
        for block in blocks:
            read = cache(partial(reader.read, block))
            if number == 0:
                rows[block.name] = finished.get("gram", block.name, partial(_gram, read, layout))
            if not search.done:
                search.add(
                    finished.get("counts", search.key(block.name), partial(search.count, read))
                )
            progress(block.name)
        search.advance()
    cuts = {} if densities is None else {tuple(densities): search.cuts}
    return Analysis(_gathered(rows, layout), cuts)


def trimmed_grams(
    reader: BlockReader,
    algorithm: Algorithm,
    progress: Progress = lambda name: None,
    finished: Finished | None = None,
) -> dict[str, Tensor]:
    """Return inner products of trimmed task vectors; arguments as of `analyse`."""

    def made(block: BlockLayout) -> Rows:
        gram = Gram(len(reader.layout.tasks))
        gram.add(trimmed_deltas(reader.read(block), algorithm))
        rows: Rows = gram.value.tolist()
        return rows

    finished, rows = finished or Finished(), {}
    for block in _own_blocks(reader.layout):
        rows[block.name] = finished.get("trimmed gram", block.name, partial(made, block))
        progress(block.name)
    return _gathered(rows, reader.layout)


def _own_blocks(layout: Layout) -> list[BlockLayout]:
    """Return the blocks that this process measures."""
    tasks, processes = range(len(layout.tasks)), current()
    owners = processes.share([block.bytes(tasks) for block in layout.blocks])
    return [b for b, owner in zip(layout.blocks, owners, strict=True) if owner == processes.rank]


def _gathered(rows: Mapping[str, Rows], layout: Layout) -> dict[str, Tensor]:
    """Return those of all processes, in the order of the blocks."""
    found = {name: gram for part in current().gather(rows) for name, gram in part.items()}
    names = [block.name for block in layout.blocks]
    return {name: torch.tensor(found[name], dtype=torch.float64) for name in names}


def _gram(read: Callable[[], BlockData], layout: Layout) -> Rows:
    data, gram = read(), Gram(len(layout.tasks))
    gram.add(list(data.models.values()), data.base)
    if not bool(torch.isfinite(gram.value).all()):
        _raise_non_finite(data, layout)
    rows: Rows = gram.value.tolist()
    return rows


def _raise_non_finite(data: BlockData, layout: Layout) -> None:
    """Raise for the first tensor and model that are not finite, or for products that are not."""
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


class _TrimSearch:
    """Finds what trimming keeps of each whole model, a digit a pass; see `kernels.selection`."""

    def __init__(self, layout: Layout, densities: Sequence[float]):
        size = sum(block.size for block in layout.blocks)
        self._passes, self._densities = 0, list(densities)
        self._searches = [
            CutSearch(kept(density, size), layout.dtype) if density < 1 else None
            for density in densities
        ]

    @property
    def done(self) -> bool:
        return all(search is None or search.done for search in self._searches)

    @property
    def cuts(self) -> Cuts:
        return [
            EVERYTHING if search is None else Cut(search.cut.pattern, ALL_TIES)
            for search in self._searches
        ]

    def key(self, block: str) -> str:
        """Return what names a block's counts: after the first pass they depend on densities."""
        given = self._densities if self._passes else [density < 1 for density in self._densities]
        return json.dumps([block, self._passes, given])

    def count(self, read: Callable[[], BlockData]) -> Counts:
        """Count one block in this pass; it counts when it is given to `add`."""
        return [
            None if search is None else _packed(_counted(search, read(), member))
            for member, search in enumerate(self._searches)
        ]

    def add(self, counts: Counts) -> None:
        for search, found in zip(self._searches, counts, strict=True):
            if search is not None and found is not None:
                search.take(_unpacked(found, search.bins))

    def advance(self) -> None:
        """End a pass, in all processes, with what all of them have taken in."""
        if self.done:
            return
        processes = current()
        own = [None if s is None else _packed(s.taken) for s in self._searches]
        for rank, counts in enumerate(processes.gather(own)):
            if rank != processes.rank:
                self.add(counts)
        for search in self._searches:
            if search is not None:
                search.advance()
        self._passes += 1


def _counted(search: CutSearch, data: BlockData, member: int) -> Tensor:
    """Return what `search` counts of a task vector, which is formed in pieces."""
    total = torch.zeros(search.bins, dtype=torch.int64, device=data.base.device)
    for part in chunks(data.base):
        models = {member: data.models[member][part]}
        piece = BlockData(data.layout, data.base[part], models)
        total.add_(search.count(*deltas_of(piece, [member])))
    return total


def _packed(counts: Tensor) -> str:
    """Return counts, most of which are 0, as text."""
    counts = counts.cpu()
    filled = counts.nonzero().view(-1)
    steps = filled.diff(prepend=filled.new_zeros(1))  # small numbers, which compress well
    content = torch.stack((steps, counts[filled])).numpy().tobytes()
    return base64.b64encode(zlib.compress(content, 1)).decode("ascii")


def _unpacked(text: str, size: int) -> Tensor:
    content = bytearray(zlib.decompress(base64.b64decode(text)))
    counts = torch.zeros(size, dtype=torch.int64)
    if content:
        steps, found = torch.frombuffer(content, dtype=torch.int64).view(2, -1)
        counts[steps.cumsum(0)] = found
    return counts
