"""TSV-Merge: Gargiulo et al. 2025, "Task Singular Vectors". See `kernels.tsv`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ext.declared.linear import BOUNDED_LAMBDA, CALIBRATED_LAMBDA
from mergekit_ext.declared.method import BLOCKS, Call, Merged, Method, register
from mergekit_ext.kernels.tsv import tsv_merge


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return :math:`\lambda\,\hat U\,\mathrm{diag}(\sigma)\,\hat V^T` of the :math:`w_i t_i`.

    Of each of the m task vectors the :math:`k = \max(1, \lfloor \mathrm{short\ side}/m \rfloor)`
    leading triplets take part, counted on the change itself: of a LoRA mostly all of them.
    Vectors are averaged.
    """
    count = None if call.short_side is None else max(1, call.short_side // len(tensors))
    merged = tsv_merge(tensors, call.layout, count)
    return Merged(merged.mul_(call.options["lambda"]))


def copies(models: int, square: float) -> float:
    """Task vectors, and decompositions in float64, one for each thread."""
    at_once = min(models, torch.get_num_threads())
    return models + 10 + 12 * square + at_once * (6 + 12 * square)


register(
    Method(
        "tsv_m",
        "TSV-Merge",
        "https://arxiv.org/abs/2412.00081",
        merge,
        parameters=(CALIBRATED_LAMBDA,),
        invariant=lambda options: True,
        variants={BLOCKS: {"lambda": BOUNDED_LAMBDA}},
        matrices=True,
        orthogonal=True,
        copies=copies,
        use="Tasks with little in common: the directions of each are kept apart.",
    )
)
