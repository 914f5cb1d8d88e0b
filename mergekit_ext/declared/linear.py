r"""Weighted sums: `linear`, `average`, `task_arithmetic`, and FlexMerge's baseline with K-means.

Wortsman et al. 2022, "Model soups"; Ilharco et al. 2023, "Editing Models with Task Arithmetic",
section 2; FlexMerge, footnote 1 and section 4; Zhang et al. 2025, "Channel Merging".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mergekit_ext.core.parameters import AUTO, Auto, Factor, Finite, Parameter, Switch
from mergekit_ext.declared.method import ADAPTERS, BLOCKS, Call, Merged, Method, divisor, register
from mergekit_ext.kernels.numerics import weighted_sum

SOUPS = "https://arxiv.org/abs/2203.05482"
TASK_VECTORS = "https://arxiv.org/abs/2212.04089"

LAMBDA = Parameter("lambda", Finite | Auto, 1.0, "factor of the merged task vector")
# Of methods that add up task vectors, and mostly go too far at 1 (docs/evidence.md).
CALIBRATED_LAMBDA = replace(LAMBDA, default=AUTO)
# In FlexMerge, which does not look at every value that it makes.
BOUNDED_LAMBDA = replace(LAMBDA, kind=Factor | Auto)


def normalize(default: bool) -> Parameter:
    return Parameter("normalize", Switch, default, "divide by the sum of the weights")


def normalized(options: Mapping[str, Any]) -> bool:
    return bool(options["normalize"])


def linear(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return :math:`\sum_i w_i t_i`, divided by :math:`\sum_i w_i` if `normalize`."""
    total = weighted_sum(tensors, call.weights)
    # NAN gives changes of zero no weight.
    if call.options["normalize"] and any(bool(tensor.any()) for tensor in tensors):
        total.div_(divisor(call.weights, "normalize: false"))
    return Merged(total)


def task_arithmetic(tensors: Sequence[Tensor], call: Call) -> Merged:
    r"""Return :math:`\lambda \sum_i w_i t_i`; with `normalize` divided by :math:`\sum_i w_i`."""
    return Merged(linear(tensors, call).tensor.mul_(call.options["lambda"]))


def _mean_factor(weights: Sequence[float], options: Mapping[str, Any]) -> float:
    return 1 / divisor(weights)


def _lambda_of_mean(weights: Sequence[float], options: Mapping[str, Any]) -> float:
    return float(options["lambda"]) / len(weights)


def _sum_times(
    factor: Callable[[Sequence[float], Mapping[str, Any]], float],
) -> Callable[[Sequence[Tensor], Call], Merged]:
    def merge(tensors: Sequence[Tensor], call: Call) -> Merged:
        total = weighted_sum(tensors, call.weights)
        return Merged(total.mul_(factor(call.weights, call.options)))

    return merge


LINEAR = Method(
    "linear",
    "Linear",
    SOUPS,
    linear,
    parameters=(normalize(True),),
    drivers=frozenset({ADAPTERS}),
    weighs=True,
    invariant=lambda options: True,
    divides=normalized,
    use="The mean of what inputs do: the start for inputs that are alike.",
)
TASK_ARITHMETIC = replace(
    LINEAR,
    name="task_arithmetic",
    title="Task arithmetic",
    paper=TASK_VECTORS,
    merge=task_arithmetic,
    parameters=(normalize(False), LAMBDA),
    use="Tasks with little in common, which add up; lambda says how far.",
)
AVERAGE = Method(
    "average",
    "Average",
    SOUPS,
    _sum_times(_mean_factor),
    drivers=frozenset({BLOCKS}),
    weighs=True,
    divides=lambda options: True,
    linear=_mean_factor,
    use=LINEAR.use,
)
# lambda times the mean: FlexMerge, footnote 1, with the 1.5 of its section 4.
MEAN_TASK_ARITHMETIC = replace(
    AVERAGE,
    name="task_arithmetic",
    title="Task arithmetic",
    paper=TASK_VECTORS,
    merge=_sum_times(_lambda_of_mean),
    parameters=(Parameter("lambda", Factor | Auto, 1.5, "scales the mean task vector"),),
    divides=lambda options: False,
    linear=_lambda_of_mean,
    use=TASK_ARITHMETIC.use,
)
# The baseline of FlexMerge, section 4.2: Zhang et al. cluster channels; here whole blocks.
CHANNEL_MERGING = replace(
    MEAN_TASK_ARITHMETIC,
    name="channel_merging",
    title="Channel Merging",
    paper="https://arxiv.org/abs/2412.15283",
    kmeans=True,
    use="A baseline of whole sizes, to compare with.",
    example={"target_size": 2},
)

for _method in (LINEAR, TASK_ARITHMETIC, AVERAGE, MEAN_TASK_ARITHMETIC, CHANNEL_MERGING):
    register(_method)
