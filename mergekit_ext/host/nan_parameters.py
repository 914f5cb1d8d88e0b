"""The parameters that `nan` and every `nan_<method>` have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from mergekit.merge_methods import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.base import MergeMethod, ParameterScope, ParameterSpec
from pydantic import Field

from mergekit_ext.host.blocks import block_of

# Which tensors share one set of coefficients: from the name of a tensor to the name of its group.
GRANULARITIES: dict[str, Callable[[str], str]] = {
    "tensor": lambda name: name,
    "block": block_of,
    "model": lambda name: "model",
}

NormOf = Literal["task_vector", "weights"]
Granularity = Literal["tensor", "block", "model"]
# Wide enough for every use, and no product of it leaves float32.
Factor = Annotated[float, Field(ge=-1e6, le=1e6)]

SHARED = (
    ParameterSpec(
        "norm_of",
        NormOf | None,
        ParameterScope.SHARED,
        default=None,
        description="whose norms: task_vector (default with a base) or weights (without)",
    ),
    ParameterSpec(
        "granularity",
        Granularity,
        ParameterScope.SHARED,
        default="tensor",
        description="what shares one set of coefficients: tensor, block or model",
    ),
    ParameterSpec(
        "scale",
        Factor | None,
        ParameterScope.SHARED,
        default=None,
        description="global factor; default max(1, m/2) over a base, 1 without",
    ),
)

# What these mean in mergekit's sparsifying methods, which take any number: at a density of 0 or
# less most of them drop the whole task vector, above 1 all keep it. `epsilon` goes up and down
# from the density, which is between 0 and 1.
_RANGES: dict[str, Any] = {
    "density": Annotated[float, Field(gt=0, le=1)],
    "gamma": Annotated[float, Field(ge=0, lt=1)],
    "epsilon": Annotated[float, Field(ge=0, lt=0.5)],
}


def parameters_with_nan(method: MergeMethod) -> Iterator[ParameterSpec]:
    """The parameters of `nan_<method>`: those of `method`, and `SHARED`.

    `weight` gets a default, and `density`, `gamma` and `epsilon` of mergekit's sparsifying
    methods their range.
    """
    yield from SHARED
    ranges = _RANGES if isinstance(method, GeneralizedTaskArithmeticMerge) else {}
    for spec in method.spec.parameters:
        if spec.name == "weight":
            yield ParameterSpec("weight", Factor, spec.scope, default=1.0)
        elif spec.name in ranges:
            yield dataclasses.replace(spec, value_type=ranges[spec.name])
        else:
            yield spec
