"""The methods that are compared, and what is given to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table: a method with what it is given as published.

    Attributes:
        method: in YAML.
        given: shared parameters that have no default, and the factor as published.
        based: whether the common start is given as the base; adapters have none.
        each: parameters of every model.
        factor: the parameter that multiplies the merged change; its value "auto" is tried.
        auto: whether the method has that value.
        anchor: the value of `factor` that leaves the change out, where it is not the start.
        variants: other shared parameters that tuning tries.
    """

    method: str
    given: Parameters = field(default_factory=dict)
    based: bool = True
    each: Parameters = field(default_factory=dict)
    factor: str | None = None
    auto: bool = False
    anchor: float | None = None
    variants: Sequence[Parameters] = ()


_WEIGHT = {"weight": 1.0}
_PAPER, _ONE = {"scale": "paper"}, {"lambda": 1.0}
_DENSITIES = ({"density": 0.1}, {"density": 0.3})
_LORE = {**_ONE, "mu_relative": 0.1}
_MUS = ({"mu_relative": 0.03}, {"mu_relative": 0.3})
_SIZE_1 = {"target_size": 1, "heads": "merged"}

AVERAGE = "linear"
MODELS: Mapping[str, Row] = {
    AVERAGE: Row("linear", based=False, each=_WEIGHT),
    "task_arithmetic": Row("task_arithmetic", each=_WEIGHT, factor="lambda"),
    "ties": Row("ties", each=_WEIGHT, factor="lambda", variants=_DENSITIES),
    "dare_ties": Row("dare_ties", each=_WEIGHT, factor="lambda", variants=_DENSITIES),
    "model_stock": Row("model_stock"),
    "sce": Row("sce", variants=({"select_topk": 0.1}, {"select_topk": 0.3})),
    "karcher": Row("karcher", based=False),
    "nan": Row("nan", _PAPER, factor="scale", auto=True),
    "nan, no base": Row("nan", based=False),
    "nan_ties": Row("nan_ties", _PAPER, factor="scale", auto=True, variants=_DENSITIES),
    "lore": Row("lore", _LORE, factor="lambda", auto=True, variants=_MUS),
    "lore, no base": Row(
        "lore", _LORE, False, factor="lambda", auto=True, anchor=0.0, variants=_MUS
    ),
    "tsv_m": Row("tsv_m", _ONE, factor="lambda", auto=True),
    "iso_c": Row("iso_c", factor="lambda", auto=True),
    "iso_cts": Row("iso_cts", factor="lambda", auto=True),
    "pcb": Row("pcb", factor="lambda", auto=True, variants=({"density": 0.3},)),
    "emr": Row("emr", _ONE, factor="lambda", auto=True),
    **{
        f"flexmerge {name}": Row(
            "flexmerge", {**_SIZE_1, "algorithm": name}, factor="lambda", auto=True
        )
        for name in ("task_arithmetic", "ties")
    },
}
_SHARES = ({"density": 0.3}, {"density": 0.6})
ADAPTERS: Mapping[str, Row] = {
    AVERAGE: Row("linear"),
    "task_arithmetic": Row("task_arithmetic", factor="lambda", auto=True),
    "ties": Row("ties", factor="lambda", auto=True, variants=_SHARES),
    "dare_ties": Row("dare_ties", factor="lambda", auto=True, variants=_SHARES),
    "nan": Row("nan", _PAPER, factor="scale", auto=True),
    "lore": Row("lore", _LORE, factor="lambda", auto=True, variants=_MUS),
    "tsv_m": Row("tsv_m", _ONE, factor="lambda", auto=True),
    "iso_c": Row("iso_c", factor="lambda", auto=True),
    "iso_cts": Row("iso_cts", factor="lambda", auto=True),
    "pcb": Row("pcb", factor="lambda", auto=True),
    "emr": Row("emr", _ONE, factor="lambda", auto=True),
}
# Merged norms, over the mean norm of the inputs, that tuning tries.
NORMS = (0.3, 0.45, 0.6, 0.75, 0.9, 1.1, 1.4)


def rows(adapters: bool) -> Mapping[str, Row]:
    """Return the lines of a family's table."""
    return ADAPTERS if adapters else MODELS
