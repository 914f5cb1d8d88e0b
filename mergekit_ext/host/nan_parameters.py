"""The parameters that `nan` and every `nan_<method>` have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
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
