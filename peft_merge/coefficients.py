"""NAN's coefficients of a planned merge: measured, told to callbacks, and looked at."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import cast

from mergekit_ext.errors import UniformCoefficientsWarning
from mergekit_ext.events import Dispatcher, StatisticsBegin, StatisticsEnd, TensorMeasured
from mergekit_ext.kernels.nan import uniform
from peft_merge import ia3
from peft_merge.adapter import Ia3Adapter, LoraAdapter
from peft_merge.config.plan import MergePlan
from peft_merge.rules.base import Rule
from peft_merge.statistics import GRANULARITIES, coefficients, lora_norms

# The share of the adapted weights with equal coefficients from which on a user is told.
_MOST = 0.95


def measured(plan: MergePlan, rule: Rule, events: Dispatcher) -> dict[str, list[float]]:
    """For each module the coefficients of the adapters; nothing for a rule without NAN.

    Warns:
        UniformCoefficientsWarning: they came out equal nearly everywhere.

    Raises:
        NonFiniteError: an adapter holds NaN or infinity.
    """
    if rule.coefficients is None:
        return {}
    started = time.perf_counter()
    events.emit(StatisticsBegin(len(plan.modules), "module"))
    granularity = str(plan.resolve(plan.modules[0]).options["granularity"])
    found = coefficients(_norms(plan, events), granularity)
    names = [adapter.name for adapter in plan.adapters]
    groups = {
        GRANULARITIES[granularity](module): dict(zip(names, values, strict=True))
        for module, values in found.items()
    }
    events.emit(StatisticsEnd(groups, time.perf_counter() - started))
    _look(plan, rule, found)
    return found


def _norms(plan: MergePlan, events: Dispatcher) -> dict[str, list[float]]:
    if plan.kind == "lora":
        loras = [adapter for adapter in plan.adapters if isinstance(adapter, LoraAdapter)]
        return lora_norms(loras, lambda module: events.emit(TensorMeasured(module)))
    vectors = [adapter for adapter in plan.adapters if isinstance(adapter, Ia3Adapter)]
    norms = ia3.norms(vectors, space=cast(ia3.Space, plan.space))
    for module in norms:
        events.emit(TensorMeasured(module))
    return norms


def _look(plan: MergePlan, rule: Rule, found: Mapping[str, Sequence[float]]) -> None:
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
            stacklevel=5,
        )
