r"""NAN's coefficients of a merge of adapters: norms of changes, without the changes.

:math:`\|BA\|_F^2 = \langle B^T B,\, A A^T \rangle`: two r x r products for each module.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from mergekit_ext.errors import UniformCoefficientsWarning
from mergekit_ext.events import Dispatcher, StatisticsBegin, StatisticsEnd, TensorMeasured
from mergekit_ext.kernels.linear_algebra import norm
from mergekit_ext.kernels.nan import combine_norms, inverse_norm_coefficients, uniform
from mergekit_ext.kernels.threads import by_one_thread, in_turn
from mergekit_ext.methods import Method
from peft_merge import ia3
from peft_merge.adapter import Ia3Adapter, LoraAdapter, Update, finite_update, modules_of
from peft_merge.algebra.orthonormal import orthonormal
from peft_merge.config.plan import MergePlan

# Below this share of ||B||^2 ||A||^2 the products cancel, and take digits with them.
_CANCELLED = 1e-6
# The share of the adapted weights with equal coefficients that a user is warned of.
_MOST = 0.95

# Which modules share one set of coefficients.
GRANULARITIES: dict[str, Callable[[str], str]] = {
    "tensor": lambda module: module,
    "model": lambda module: "model",
}


def measured(plan: MergePlan, rule: Method, events: Dispatcher) -> dict[str, list[float]]:
    """Return the adapters' coefficients for each module; nothing for a rule without NAN.

    Warns:
        UniformCoefficientsWarning: they came out equal nearly everywhere.

    Raises:
        NonFiniteError: an adapter holds NaN or infinity.
    """
    if not rule.nan:
        return {}
    started = time.perf_counter()
    events.emit(StatisticsBegin(len(plan.modules), "module"))
    granularity = str(plan.resolve(plan.modules[0]).options["granularity"])
    norms: dict[str, list[float]] = {}
    if plan.kind == "lora":
        loras = [adapter for adapter in plan.adapters if isinstance(adapter, LoraAdapter)]
        norms = lora_norms(loras, lambda module: events.emit(TensorMeasured(module)))
    else:
        vectors = [adapter for adapter in plan.adapters if isinstance(adapter, Ia3Adapter)]
        norms = ia3_norms(vectors, space=cast(ia3.Space, plan.space))
        for module in norms:
            events.emit(TensorMeasured(module))
    found = coefficients(norms, granularity)
    names = [adapter.name for adapter in plan.adapters]
    groups = {
        GRANULARITIES[granularity](module): dict(zip(names, values, strict=True))
        for module, values in found.items()
    }
    events.emit(StatisticsEnd(groups, time.perf_counter() - started))
    sizes = {module: math.prod(plan.shape(module)) for module in found}
    total = sum(sizes.values())
    even = sum(size for module, size in sizes.items() if uniform(found[module]))
    if total and even >= _MOST * total:
        warnings.warn(
            UniformCoefficientsWarning(
                f"{rule.name}: the coefficients came out uniform (within 1%) for "
                f"{even / total:.0%} of the adapted weights, so that only `weight` and `scale` "
                "acted. The changes have equal norms, as those of one adapter given twice: where "
                "one adapter should count for more, give it a larger `weight`."
            ),
            stacklevel=4,
        )
    return found


def coefficients(
    norms: Mapping[str, Sequence[float]], granularity: str = "tensor"
) -> dict[str, list[float]]:
    r"""Return :math:`a_i = (1/\|D_i\|_F) / \sum_j (1/\|D_j\|_F)` (NAN, equation 10), by module.

    Args:
        norms: for each module the norms of the m changes: `lora_norms`, or `ia3_norms`.
        granularity: `tensor`, each module by itself; or `model`: one set for all, from the norms
            of whole adapters.

    Returns:
        for each module m numbers that sum to 1, or zeros where no adapter changes anything. An
        adapter whose change is zero gets 0 there.
    """
    key = GRANULARITIES[granularity]
    combined = combine_norms(
        (key(module), dict(enumerate(values))) for module, values in norms.items()
    )
    found = {
        name: inverse_norm_coefficients(list(values.values())) for name, values in combined.items()
    }
    return {module: found[key(module)] for module in norms}


def lora_norms(
    adapters: Sequence[LoraAdapter], on_module: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Return for each module of any adapter the norms of all adapters, 0 for those without it.

    Args:
        adapters: read one module at a time.
        on_module: called when a module is measured.

    Raises:
        NonFiniteError: factors hold NaN or infinity.
    """
    modules = modules_of(adapters)

    def measure(module: str) -> list[float]:
        return [
            update_norm(finite_update(a, module)) if module in a.infos else 0.0 for a in adapters
        ]

    norms = {}
    for module, found in zip(modules, in_turn(measure, modules, torch.device("cpu")), strict=True):
        norms[module] = found
        if on_module is not None:
            on_module(module)
    return norms


def ia3_norms(
    adapters: Sequence[Ia3Adapter], *, space: ia3.Space = "additive"
) -> dict[str, list[float]]:
    """Return the lengths of the changes that a rule sees: of each module, one for each adapter.

    Raises:
        ConfigError, NonFiniteError: as `merge_ia3`.
    """
    ia3.check(adapters, space)
    found = {}
    for module in modules_of(adapters):
        shape = next(a.infos[module].shape for a in adapters if module in a.infos)
        changes = ia3.changes(adapters, module, space=space)
        found[module] = [norm(change.reshape(shape)) for change in changes]
    return found


@by_one_thread
def update_norm(update: Update) -> float:
    r"""Return :math:`\sqrt{\|s B A\|_F^2 + \|s\,\mathrm{bias}\|^2}` of one module, in float64.

    The bias of B belongs to the change: a module may change nothing else.
    """
    a, b = update.a.to(torch.float64), update.b.to(torch.float64)
    inner, outer = b.mT @ b, a @ a.mT
    square = float((inner * outer).sum())
    largest = float((_traces(inner) * _traces(outer)).sum())
    if square < _CANCELLED * largest:
        core = orthonormal(b).coordinates @ orthonormal(a.mT).coordinates.mT
        square = float(core.square().sum())
    bias = 0.0 if update.bias is None else float(update.bias.to(torch.float64).square().sum())
    return abs(update.scale) * math.sqrt(square + bias)


def _traces(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
