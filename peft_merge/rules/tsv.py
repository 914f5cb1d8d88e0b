"""TSV-Merge of adapters, see `mergekit_ext.kernels.tsv`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_ext.kernels.tsv import tsv_merge
from peft_merge.rules.base import Call, Merged, Rule, register
from peft_merge.rules.parameters import LAMBDA


def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
    r""":math:`\lambda\,\hat U\,\mathrm{diag}(\sigma)\,\hat V^T` of the :math:`w_i D_i`.

    Gargiulo et al. 2025, "Task Singular Vectors". Of each of the m changes the
    :math:`k = \max(1, \lfloor \min(\mathrm{rows}, \mathrm{columns})/m \rfloor)` leading triplets
    take part, counted on the change itself (`Call.shape`): of a LoRA mostly all of them. Vectors
    are averaged.
    """
    weighted = [tensor * weight for tensor, weight in zip(tensors, call.weights, strict=True)]
    count = max(1, min(call.shape) // len(tensors))
    return Merged(tsv_merge(weighted, count=count).mul_(call.options["lambda"]))


register(Rule("tsv_m", merge, invariant=True, parameters=(LAMBDA,)))
