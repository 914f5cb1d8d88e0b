r"""Weighted sums: `linear` and `task_arithmetic`.

Wortsman et al. 2022, "Model soups", and Ilharco et al. 2023, "Editing Models with Task
Arithmetic", section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_ext.kernels.lore_combine import weighted_sum
from peft_merge.rules.base import Call, Merged, Rule, register
from peft_merge.rules.parameters import LAMBDA, divided_by, normalize, normalized


def linear(tensors: Sequence[Tensor], call: Call) -> Merged:
    r""":math:`\sum_i w_i D_i`, divided by :math:`\sum_i w_i` if `normalize`."""
    total = weighted_sum(tensors, call.weights)
    # NAN gives changes of zero no weight.
    if call.options["normalize"] and any(bool(tensor.any()) for tensor in tensors):
        total.div_(divided_by(call.weights, "normalize: false"))
    return Merged(total)


def task_arithmetic(tensors: Sequence[Tensor], call: Call) -> Merged:
    r""":math:`\lambda \sum_i w_i D_i`; with `normalize` divided by :math:`\sum_i w_i`."""
    return Merged(linear(tensors, call).tensor.mul_(call.options["lambda"]))


register(Rule("linear", linear, invariant=True, parameters=(normalize(True),), divides=normalized))
register(
    Rule(
        "task_arithmetic",
        task_arithmetic,
        invariant=True,
        parameters=(normalize(False), LAMBDA),
        divides=normalized,
    )
)
