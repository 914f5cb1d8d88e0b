"""How many bytes the kernels hold at once: upper estimates from shapes alone.

Each function is that of a kernel or of what is done around one. It returns bytes by what they are
for; the inputs, where they lie as they were read, are not among them. docs/limits.md has the
formulas, bench/README.md what was measured against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergekit_ext.kernels.lore_descent import MEMORY
from mergekit_ext.kernels.lore_span import WORTHWHILE
from mergekit_ext.kernels.numerics import chunk_length
from mergekit_ext.kernels.order_statistic import GATHER

Parts = Mapping[str, int]
_DOUBLE = 8


@dataclass(frozen=True)
class Work:
    """One tensor, or one block, that is merged.

    Attributes:
        shape: of the tensor.
        models: how many, the base not counted.
        based: whether there is a base.
        width: bytes of an entry in the arithmetic.
        out: bytes of an entry of the result.
        layout: how tensors of more than two axes are seen, as for `lore`.
        threads: how many compute at once.
        device: "cpu", or the kind of accelerator.
    """

    shape: tuple[int, ...]
    models: int
    based: bool = True
    width: int = 4
    out: int = 4
    layout: str = "matrix"
    threads: int = 1
    device: str = "cpu"

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def unit(self) -> int:
        """Bytes of the tensor in the arithmetic's dtype."""
        return self.size * self.width

    @property
    def chunk(self) -> int:
        """Entries that a kernel sees at once."""
        return min(self.size, chunk_length(self.device))

    @property
    def sides(self) -> tuple[int, int]:
        """Short and long side of each of its matrices."""
        if len(self.shape) < 2:
            return 0, 0
        matrix = self.shape[-2:]
        if self.layout == "flattened":
            matrix = (self.shape[0], math.prod(self.shape[1:]))
        return min(matrix), max(matrix)


def largest(many: Iterable[Parts]) -> Parts:
    """Those of the one that needs the most."""
    return max(many, key=lambda parts: sum(parts.values()), default={})


def result(work: Work) -> Parts:
    """The merged tensor."""
    return {"the result": work.size * work.out}


def sums(work: Work) -> Parts:
    """`add_task_vectors`, `weighted_sum` and `squared_norms`: pieces of every input."""
    pieces = 3 * work.chunk * max(work.width, 4)
    return {**result(work), "pieces": work.threads * pieces}


def ties(work: Work) -> Parts:
    """`merge_ties`: a piece of each task vector, and what trims and elects."""
    return {**result(work), "pieces": work.chunk * (2 * work.models + 16) * work.width}


def elected(work: Work) -> Parts:
    """`emr.unified` over pieces of each task vector."""
    return {**result(work), "pieces": work.chunk * ((work.models + 5) * work.width + _DOUBLE)}


def task_vectors(work: Work) -> Parts:
    """The task vectors of all models and the base, whole."""
    return {"task vectors": (work.models + 1) * work.unit}


def pcb(work: Work) -> Parts:
    """`pcb_merge`: the sum of the task vectors, and numbers that are gathered to be ranked."""
    gathered = min(work.size, GATHER)
    return {
        **result(work),
        "the sum in float64": work.size * _DOUBLE,
        "the merged task vector": work.unit,
        "numbers that are ranked": (4 * gathered + 10 * work.chunk) * _DOUBLE,
    }


def tsv(work: Work) -> Parts:
    """`tsv_merge`: decompositions in float64, of as many models at once as there are threads.

    A singular value decomposition where a Gram matrix does not suffice, as it is for updates of
    low rank. Of each model at least one direction is joined: with more models than rows that is
    more than a matrix has.
    """
    short, long = work.sides
    small, matrix = _DOUBLE * short * short, _DOUBLE * short * long
    at_once = min(work.threads, work.models)
    decomposing = at_once * (3 * matrix + 6 * small) + small + matrix
    columns = max(short, work.models) if short else 0
    joining = _DOUBLE * (6 * columns * long + 15 * columns * columns)
    return {
        **result(work),
        "the merged task vector": 2 * work.unit,
        "decompositions in float64": max(decomposing, joining),
    }


def lore(work: Work) -> Parts:
    """`lore`: inputs, differences and two sets of task vectors, and the solver's history."""
    short, long = work.sides
    inputs = work.models + work.based
    if not short:
        return {**result(work), "inputs and differences": (2 * inputs + 4) * work.unit}
    matrix = work.width * short * long
    gram = _DOUBLE * short * short
    spanned = (work.models - 1) * short
    reduced = not work.based and 0 < spanned <= WORTHWHILE * long
    across = spanned if reduced else long
    inner = work.width * short * across
    history = 0 if work.based else 2 * (MEMORY + 3) * inner
    return {
        **result(work),
        "inputs in the arithmetic": inputs * matrix,
        "differences, whole": 2 * work.models * matrix,
        "the basis of the differences": 6 * (work.models - 1) * matrix if reduced else 0,
        "task vectors": 4 * work.models * inner,
        "the solver's steps": history + 4 * inner,
        "Gram matrix and eigenvectors in float64": _DOUBLE * short * across + 5 * gram,
        "what is known of each spectrum": work.models * gram,
        "merged tensor and base": 3 * work.unit,
    }


def foreign(work: Work) -> Parts:
    """A method of mergekit's or of others, of which only shapes are known.

    Measured over mergekit's own: task vectors, weighted ones, masks and sums of all models.
    """
    return {**result(work), "the method": (8 * work.models + 6) * work.unit}
