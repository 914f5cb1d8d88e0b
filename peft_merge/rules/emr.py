"""EMR-Merging's unified vector, see `mergekit_ext.kernels.emr`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mergekit_ext.kernels import emr
from peft_merge.rules.base import Call, Merged, Pieces, Rule, register
from peft_merge.rules.parameters import LAMBDA


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r""":math:`\lambda\,\tau_{uni}` of the :math:`w_i D_i`.

    Huang et al. 2024, "EMR-Merging". The elected sign of each entry, and the largest magnitude
    among those that have it. One adapter for all tasks: without the masks and rescalers, which
    need the task at run time.
    """
    weighted = [tensor * weight for tensor, weight in zip(tensors, call.weights, strict=True)]
    (unified,) = emr.unified([[tensor] for tensor in weighted])
    return Merged(unified.mul_(call.options["lambda"]))


def blockwise(sources: Sequence[Pieces], call: Call) -> Iterator[Tensor]:
    """`merge`, some rows at a time."""
    for pieces in zip(*(source() for source in sources), strict=True):
        yield merge(pieces, call).tensor


register(Rule("emr", merge, invariant=False, parameters=(LAMBDA,), blockwise=blockwise))
