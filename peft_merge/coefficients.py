r"""NAN's coefficients of a merge of adapters: norms of changes, without the changes.

:math:`\|BA\|_F^2 = \langle B^T B,\, A A^T \rangle`: two r x r products for each module.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mergekit_ext.declared import Method
from mergekit_ext.declared.nan import inverse_norm_coefficients, uniform_warning
from mergekit_ext.errors import warn
from mergekit_ext.events import Dispatcher, TensorMeasured, measuring
from mergekit_ext.kernels.linear_algebra import norm
from mergekit_ext.kernels.threads import by_one_thread, in_turn
from peft_merge.adapter import Ia3Adapter, Update, finite_updates
from peft_merge.algebra.core_space import orthonormal
from peft_merge.config.plan import MergePlan
from peft_merge.modules import vector_changes

# Below this share of ||B||^2 ||A||^2 the products cancel, and take digits with them.
_CANCELLED = 1e-6


def measured(plan: MergePlan, rule: Method, events: Dispatcher) -> dict[str, list[float]]:
    """Return the adapters' coefficients for each module; nothing for a rule without NAN."""
    if not rule.nan:
        return {}
    norms, names = {}, [adapter.name for adapter in plan.adapters]
    with measuring(events.emit, len(plan.modules), "module") as groups:
        measure = partial(change_norms, plan.adapters, space=plan.space)
        found = in_turn(measure, plan.modules, torch.device("cpu"))
        for module, each in zip(plan.modules, found, strict=True):
            norms[module] = each
            events.emit(TensorMeasured(module))
        whole = plan.resolve(plan.modules[0]).options["granularity"] == "model"
        values = coefficients(norms, whole=whole)
        for module, each in values.items():
            groups["model" if whole else module] = dict(zip(names, each, strict=True))
    sized = [(math.prod(plan.shape(module)), found) for module, found in values.items()]
    why = (
        "The changes have equal norms, as those of one adapter given twice: where one adapter "
        "should count for more, give it a larger `weight`."
    )
    if (warning := uniform_warning(rule.name, sized, "adapted weights", why)) is not None:
        warn(warning)
    return values


def coefficients(
    norms: Mapping[str, Sequence[float]], *, whole: bool = False
) -> dict[str, list[float]]:
    r"""Return :math:`a_i = (1/\|D_i\|_F) / \sum_j (1/\|D_j\|_F)` (NAN, equation 10), by module.

    `norms` are the `change_norms` of each module; `whole`: one set for all modules, from the norms
    of whole adapters.
    """
    if whole:
        total = [math.hypot(*each) for each in zip(*norms.values(), strict=True)]
        return dict.fromkeys(norms, inverse_norm_coefficients(total))
    return {module: inverse_norm_coefficients(each) for module, each in norms.items()}


def change_norms(adapters: Sequence[Any], module: str, *, space: str) -> list[float]:
    """Return the norms of the changes of a module that a rule sees; 0 for adapters without it."""
    if isinstance(adapters[0], Ia3Adapter):
        return [norm(change) for change in vector_changes(adapters, module, space)]
    return [*map(update_norm, finite_updates(adapters, module))]


@by_one_thread
def update_norm(update: Update) -> float:
    r"""Return :math:`\sqrt{\|s B A\|_F^2 + \|s\,\mathrm{bias}\|^2}` of one module, in float64."""
    a, b = update.a.to(torch.float64), update.b.to(torch.float64)
    inner, outer = b.mT @ b, a @ a.mT
    square = float((inner * outer).sum())
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) for gram in (inner, outer)]
    largest = float((traces[0] * traces[1]).sum())
    if square < _CANCELLED * largest:
        core = orthonormal(b).coordinates @ orthonormal(a.mT).coordinates.mT
        square = float(core.square().sum())
    bias = 0.0 if update.bias is None else float(update.bias.to(torch.float64).square().sum())
    return abs(update.scale) * math.sqrt(square + bias)
