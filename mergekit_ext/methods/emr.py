"""EMR-Merging: Huang et al. 2024, section 3. See `kernels.emr`.

Merged into one model or adapter it is the unified vector alone: masks and rescalers need the task
at run time. FlexMerge stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mergekit_ext.kernels import emr
from mergekit_ext.methods.linear import LAMBDA
from mergekit_ext.methods.method import BLOCKS, Call, Masks, Merged, Method, Pieces
from mergekit_ext.methods.registry import register


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return :math:`\lambda\,\tau_{uni}` of the :math:`w_i t_i`.

    The elected sign of each entry, and the largest magnitude among those that have it.
    """
    (unified,) = emr.unified([[tensor] for tensor in tensors])
    return Merged(unified.mul_(call.options.get("lambda", 1.0)))


def rows(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
    """Yield the merged rows, some at a time."""
    for pieces in zip(*(source() for source in sources), strict=True):
        weighted = [piece.mul_(w) for piece, w in zip(pieces, call.weights, strict=True)]
        yield merge(weighted, call).tensor


register(
    Method(
        "emr",
        "EMR-Merging",
        "https://arxiv.org/abs/2405.17461",
        merge,
        parameters=(LAMBDA,),
        # A factor of a task vector would be undone by its rescaler.
        variants={BLOCKS: {"lambda": None, "weight": None}},
        elementwise=True,
        # Task vectors are formed in pieces.
        copies=lambda models, square: 0,
        blockwise=rows,
        masks=Masks(
            lambda delta, unified, options: emr.mask(delta, unified),
            lambda delta, unified: emr.rescale([delta], [unified]),
        ),
    )
)
