"""EMR-Merging and Consensus: FlexMerge stores their groups as one vector and a mask for each task.

Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging", section 3; Wang et al.
2024, "Localizing Task Information for Improved Model Merging and Compression", as FlexMerge uses it
(section 3.3). See `kernels.masks`.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ext.core.parameters import Number, Parameter
from mergekit_ext.declared.linear import CALIBRATED_LAMBDA
from mergekit_ext.declared.method import BLOCKS, Call, Merged, Method, Pieces, register
from mergekit_ext.declared.ties import FLEXMERGE_DENSITY
from mergekit_ext.kernels import masks
from mergekit_ext.kernels.ties import TiesOptions, merge_ties

_BOUNDED = Annotated[Number, Field(ge=0, le=1e6)]
_LET = "how much of the unified vector the masks let through"
_THRESHOLD = Parameter("threshold", _BOUNDED, masks.DEFAULT_THRESHOLD, _LET)


def emr(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return :math:`\lambda\,\tau_{uni}` of the :math:`w_i t_i`.

    The elected sign of each entry, and the largest magnitude among those that have it. One model
    or adapter is the unified vector alone: masks and rescalers need the task at run time.
    """
    return Merged(masks.elected(tensors).mul_(call.options.get("lambda", 1.0)))


def emr_rows(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
    for pieces in zip(*(source() for source in sources), strict=True):
        weighted = [piece.mul_(w) for piece, w in zip(pieces, call.weights, strict=True)]
        yield emr(weighted, call).tensor


def consensus_over_base(
    base: Tensor | None, models: Sequence[Tensor], call: Call, dtype: torch.dtype
) -> Merged:
    assert base is not None
    return Merged(merge_ties(base, models, call.weights, call.kept, TiesOptions(), dtype))


def consensus(tensors: Sequence[Tensor], call: Call) -> Merged:
    return consensus_over_base(torch.zeros_like(tensors[0]), tensors, call, tensors[0].dtype)


register(
    Method(
        "emr",
        "EMR-Merging",
        "https://arxiv.org/abs/2405.17461",
        emr,
        parameters=(CALIBRATED_LAMBDA,),
        # A factor of a task vector would be undone by its rescaler.
        variants={BLOCKS: {"lambda": None, "weight": None}},
        elementwise=True,
        # Task vectors are formed in pieces.
        copies=lambda models, square: 0,
        blockwise=emr_rows,
        mask=lambda delta, unified, options: masks.sign_mask(delta, unified),
        rescale=masks.rescaler,
        use="Tasks that differ, kept apart by FlexMerge's masks from size 2 on; alone one vector.",
    )
)
register(
    Method(
        "consensus",
        "Consensus",
        "https://arxiv.org/abs/2405.07813",
        consensus,
        parameters=(_THRESHOLD, FLEXMERGE_DENSITY),
        drivers=frozenset({BLOCKS}),
        weighs=True,
        over_base=consensus_over_base,
        trims=True,
        mask=lambda delta, unified, options: masks.tall_mask(delta, unified, options["threshold"]),
        use="Masks over a TIES merge, which leave out what a task does not need.",
    )
)
