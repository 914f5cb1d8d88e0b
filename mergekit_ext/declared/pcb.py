"""PCB-Merging: Du et al. 2024, "Parameter Competition Balancing for Model Merging".

See `kernels.pcb`.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from mergekit_ext.core.parameters import Number, Parameter, Share
from mergekit_ext.declared.linear import BOUNDED_LAMBDA, LAMBDA
from mergekit_ext.declared.method import BLOCKS, Call, Merged, Method, register
from mergekit_ext.kernels.pcb import DEFAULT_CLIP, DEFAULT_DENSITY, pcb_merge

# The kernel clips below half at either end.
_HALF = Annotated[Number, Field(ge=0, le=0.499)]


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return :math:`\lambda \sum_i s_i \circ c_i / \sum_i s_i` of the :math:`w_i t_i`.

    *Departure.* The least score of each task vector gets :math:`s_i = 0`, even at `density` 1.
    One task vector alone has no competitor: at `density` 1 and `clip` 0 it is returned as it is.

    In FlexMerge with `trim_scope: model`, task vectors are trimmed over the whole model, as for
    TIES, and compete in the block with what is left; the drop of PCB itself then keeps everything.
    With ``block`` (``tensor``) the drop of PCB in the block (tensor) is the only one, as in its
    paper.
    """
    density, clip = call.options["density"], call.options["clip"]
    if len(tensors) == 1 and density == 1.0 and clip == 0.0:
        merged = tensors[0].clone()
    else:
        merged = pcb_merge(tensors, density, clip)
    return Merged(merged.mul_(call.options["lambda"]))


register(
    Method(
        "pcb",
        "PCB-Merging",
        "https://arxiv.org/abs/2410.02396",
        merge,
        parameters=(
            Parameter("density", Share, DEFAULT_DENSITY, "share of the entries that is kept"),
            Parameter("clip", _HALF, DEFAULT_CLIP, "share of magnitudes clipped at either end"),
            LAMBDA,
        ),
        variants={BLOCKS: {"lambda": BOUNDED_LAMBDA}},
        trims=True,
        use="Tasks that compete for the same entries.",
        # Task vectors, their sum in float64, and scores in float64 that are ranked.
        copies=lambda models, square: models + 12,
    )
)
