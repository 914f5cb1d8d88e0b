"""Consensus: Wang et al. 2024, "Localizing Task Information", as FlexMerge uses it (section 3.3).

The unified vector is that of TIES with lambda 1; a member takes it where
``|t| >= threshold |unified - t|``, t being its original task vector. See `kernels.consensus`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergekit_ext.core.parameters import Number, Parameter
from mergekit_ext.kernels import consensus
from mergekit_ext.kernels.ties import TiesOptions, merge_ties
from mergekit_ext.methods.method import BLOCKS, Call, Masks, Merged, Method
from mergekit_ext.methods.registry import register
from mergekit_ext.methods.ties import FLEXMERGE_DENSITY


def over_base(
    base: Tensor | None, models: Sequence[Tensor], call: Call, dtype: torch.dtype
) -> Merged:
    """Merge stored tensors by TIES."""
    assert base is not None
    return Merged(merge_ties(base, models, call.weights, call.kept, TiesOptions(), dtype))


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    """Return the unified task vector."""
    return over_base(torch.zeros_like(tensors[0]), tensors, call, tensors[0].dtype)


register(
    Method(
        "consensus",
        "Consensus",
        "https://arxiv.org/abs/2405.07813",
        merge,
        parameters=(
            Parameter(
                "threshold",
                Annotated[Number, Field(ge=0, le=1e6)],
                consensus.DEFAULT_THRESHOLD,
                "how much of the unified vector the masks let through",
            ),
            FLEXMERGE_DENSITY,
        ),
        drivers=frozenset({BLOCKS}),
        weighs=True,
        over_base=over_base,
        trims=True,
        masks=Masks(
            lambda delta, unified, options: consensus.mask(delta, unified, options["threshold"])
        ),
    )
)
