"""PCB-Merging of adapters, see `mergekit_ext.kernels.pcb`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_ext.kernels.pcb import DEFAULT_CLIP, DEFAULT_DENSITY, pcb_merge
from peft_merge.rules.base import Call, Merged, Parameter, Rule, register
from peft_merge.rules.parameters import LAMBDA

# The kernel clips below half at either end.
_MOST_CLIPPED = 0.499


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r""":math:`\lambda \sum_i s_i \circ c_i / \sum_i s_i` of the :math:`w_i D_i`.

    Du et al. 2024, "Parameter Competition Balancing for Model Merging".

    *Departure.* The least score of each change gets :math:`s_i = 0`, even at `density` 1. One
    change alone competes with nobody, so that at `density` 1 and `clip` 0 it is returned as it is.
    """
    weighted = [tensor * weight for tensor, weight in zip(tensors, call.weights, strict=True)]
    density, clip = call.options["density"], call.options["clip"]
    if len(weighted) == 1 and density == 1.0 and clip == 0.0:
        merged = weighted[0]
    else:
        (merged,) = pcb_merge([[tensor] for tensor in weighted], density, clip)
    return Merged(merged.mul_(call.options["lambda"]))


register(
    Rule(
        "pcb",
        merge,
        invariant=False,
        parameters=(
            Parameter(
                "density",
                float,
                DEFAULT_DENSITY,
                low=0.0,
                high=1.0,
                above=True,
                help="share of each change's entries that is kept",
            ),
            Parameter(
                "clip",
                float,
                DEFAULT_CLIP,
                low=0.0,
                high=_MOST_CLIPPED,
                help="share of magnitudes clipped at either end",
            ),
            LAMBDA,
        ),
    )
)
