"""Iso-C and Iso-CTS: Marczak et al. 2025, "No Task Left Behind". See `kernels.isotropic`."""

from collections.abc import Sequence

from torch import Tensor

from mergekit_ext.core.parameters import Parameter, Share
from mergekit_ext.declared.linear import BOUNDED_LAMBDA, LAMBDA
from mergekit_ext.declared.method import BLOCKS, Call, Merged, Method, register
from mergekit_ext.declared.tsv import copies
from mergekit_ext.kernels.isotropic import common_and_specific, isotropic

_PAPER = "https://arxiv.org/abs/2502.04959"
_FRACTION = Parameter(
    "common_space_fraction", Share, 0.8, "the share of the directions that all tasks have in common"
)


def common(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return :math:`\lambda\,\bar\sigma\,U V^T` of :math:`\sum_i w_i t_i`; average vectors."""
    return Merged(isotropic(tensors, call.layout).mul_(call.options["lambda"]))


def specific(tensors: Sequence[Tensor], call: Call) -> Merged:
    """Return the same in common and task-specific subspaces, times lambda."""
    fraction = call.options[_FRACTION.name]
    merged = common_and_specific(tensors, fraction, call.layout)
    return Merged(merged.mul_(call.options["lambda"]))


_BOTH = (("iso_c", "Iso-C", common, ()), ("iso_cts", "Iso-CTS", specific, (_FRACTION,)))
for name, title, merge, own in _BOTH:
    register(
        Method(
            name,
            title,
            _PAPER,
            merge,
            parameters=(*own, LAMBDA),
            invariant=lambda options: True,
            variants={BLOCKS: {"lambda": BOUNDED_LAMBDA}},
            matrices=True,
            copies=copies,
            use="Tasks with little in common: all directions of their sum count the same.",
        )
    )
