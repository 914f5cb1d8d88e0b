"""Read the inputs: inner products of each block, and what trimming keeps of each model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from mergekit_ext import parallel
from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.algorithm import Algorithm, Cuts, deltas_of, trimmed_deltas
from mergekit_ext.flexmerge.layout import BlockLayout, Layout
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.io.journal import Finished
from mergekit_ext.kernels.numerics import chunks, finite
from mergekit_ext.kernels.selection import EVERYTHING, Cut, CutSearch
from mergekit_ext.kernels.similarity import Gram
from mergekit_ext.kernels.ties import kept

# Called with the name of each block that is done.
Progress = Callable[[str], None]
# Inner products as lists: a small tensor for each block would keep the memory of large ones, freed
# around it, from being used again.
Rows = list[list[float]]
# More than any model has: a model's cut keeps every entry at its edge, as in the authors' code.
# Which of them come first would depend on the order of the blocks.
_ALL_TIES = 1 << 62


@dataclass(frozen=True)
class Analysis:
    """What is known of m models."""

    grams: Mapping[str, Tensor]  # for each block (m, m) inner products of task vectors, float64
    cuts: Mapping[tuple[float, ...], Cuts]  # by the densities that were asked for


def cuts_of(patterns: Sequence[int]) -> Cuts:
    """Return the cuts that trim whole models, made of their patterns."""
    return [EVERYTHING if p == EVERYTHING.pattern else Cut(p, _ALL_TIES) for p in patterns]


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

    `densities` are the shares of each task's whole model that trimming keeps, exactly. `progress`
    is called after each block of each pass, in the process that did it. A stopped analysis keeps
    the products of its blocks, and the cuts when it has all of them.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
    """
    finished, layout = finished or Finished(), reader.layout
    key = json.dumps(densities)
    patterns: list[int] | None = finished.found("cuts", key)
    size = sum(block.size for block in layout.blocks)
    # Of each model that is trimmed, a digit of its threshold a pass.
    searches = {
        task: CutSearch(kept(density, size), layout.dtype)
        for task, density in enumerate(densities or ())
        if density < 1 and patterns is None
    }
    blocks, rows, processes = _own_blocks(layout), {}, parallel.current()
    for number in range(passes(layout, densities)):
        counts = {task: torch.zeros(CutSearch.bins, dtype=torch.int64) for task in searches}
        for block in blocks:
            read = cache(partial(reader.read, block))
            if number == 0:
                rows[block.name] = finished.get("gram", block.name, partial(_gram, read, layout))
            for task, search in searches.items():
                counts[task] += _counted(search, read(), task)
            progress(block.name)
        for task, search in searches.items():
            search.take(torch.stack(processes.gather(counts[task])).sum(dim=0))
            search.advance()
    if densities is None:
        return Analysis(_gathered(rows, layout), {})
    if patterns is None:
        cuts = [searches[t].cut if t in searches else EVERYTHING for t in range(len(densities))]
        patterns = [cut.pattern for cut in cuts]
        finished.add("cuts", key, patterns)
    return Analysis(_gathered(rows, layout), {tuple(densities): cuts_of(patterns)})


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
        return gram.value.tolist()

    finished, rows = finished or Finished(), {}
    for block in _own_blocks(reader.layout):
        rows[block.name] = finished.get("trimmed gram", block.name, partial(made, block))
        progress(block.name)
    return _gathered(rows, reader.layout)


def _own_blocks(layout: Layout) -> list[BlockLayout]:
    tasks = range(len(layout.tasks))
    return parallel.current().own(layout.blocks, lambda block: block.bytes(tasks))


def _gathered(rows: Mapping[str, Rows], layout: Layout) -> dict[str, Tensor]:
    found = parallel.current().gather_items(rows)
    names = [block.name for block in layout.blocks]
    return {name: torch.tensor(found[name], dtype=torch.float64) for name in names}


def _gram(read: Callable[[], BlockData], layout: Layout) -> Rows:
    data, gram = read(), Gram(len(layout.tasks))
    gram.add(list(data.models.values()), data.base)
    if not bool(torch.isfinite(gram.value).all()):
        require_finite_block(data, layout)
        raise out_of_range(data.layout.name)
    return gram.value.tolist()


def require_finite_block(data: BlockData, layout: Layout) -> None:
    """Raise `NonFiniteError` for the first tensor and model that are not finite."""
    owners = [("the base model", data.base), *zip(layout.tasks, data.models.values(), strict=True)]
    for owner, vector in owners:
        for index, part in enumerate(data.layout.parts):
            finite(data.part(vector, index), part.name, owner)


def out_of_range(block: str) -> MergeError:
    """Return the error for differences that are not finite, of weights that are."""
    return MergeError(
        f"{block}: differences from the base leave the range of the arithmetic, although all "
        "weights are finite. Take out the model with such large weights."
    )


def _counted(search: CutSearch, data: BlockData, task: int) -> Tensor:
    """Return what `search` counts of a task vector, which is formed in pieces."""
    total = torch.zeros(search.bins, dtype=torch.int64, device=data.base.device)
    for part in chunks(data.base):
        piece = BlockData(data.layout, data.base[part], {task: data.models[task][part]})
        total.add_(search.count(*deltas_of(piece, [task])))
    return total.cpu()
