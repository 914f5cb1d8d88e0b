"""Every merged vector of every size, in one pass over the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ext.flexmerge.algorithms.base import Algorithm
from mergekit_ext.flexmerge.analysis import raise_non_finite
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.kernels.grouping import Merge, dendrogram
from mergekit_ext.kernels.similarity import Gram, cosines


@dataclass(frozen=True)
class Merged:
    """Some entries of the vectors of some new groups of one block.

    Attributes:
        block: where.
        merges: which groups became one, for each row.
        part: which entries of the block, one for each column.
        vectors: their weights, (merges, entries).
    """

    block: BlockLayout
    merges: Sequence[Merge]
    part: slice
    vectors: Tensor


def sweep(
    reader: BlockReader,
    algorithm: Algorithm,
    linkage: str = "min",
    forced: torch.dtype | None = None,
) -> Iterator[Merged]:
    """Yield the vector of every group that any size of a FlexMerge contains.

    A block's sequence of merges does not depend on other blocks nor on the target size: so its
    similarities and all of its m - 1 merged vectors are computed while its m vectors are in
    memory, once. They come in pieces, so that not all of them must be held; each is the
    caller's until the next one is asked for.

    Args:
        reader: reads the blocks.
        algorithm: one without masks and without trimming over whole models, which would need a
            pass of its own first.
        linkage: similarity of two groups.
        forced: the dtype of the vectors, if it is not that of the inputs.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
    """
    count = len(reader.layout.tasks)
    for data in reader.once():
        block = data.layout
        gram = Gram(count)
        gram.add(list(data.models.values()), data.base)
        if not bool(torch.isfinite(gram.value).all()):
            raise_non_finite(data, reader.layout)
        merges = dendrogram(cosines(gram.value), linkage)
        dtype = forced or block.dtype(range(count))
        unions = [merge.union for merge in merges]
        for piece in algorithm.sequence(data, unions, dtype):
            yield Merged(block, merges[piece.groups], piece.part, piece.vectors)
