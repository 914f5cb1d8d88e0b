"""The parameters that FlexMerge has for models and for adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_ext.core.parameters import Parameter, choice
from mergekit_ext.kernels.grouping import LINKAGES, ORDERS

DEFAULT_ALGORITHM = "task_arithmetic"


def options(target: Any, blocks: Sequence[str], example: str) -> tuple[Parameter, ...]:
    """Return the parameters.

    Args:
        target: the type of `target_size`.
        blocks: what a block can be, the default first.
        example: a target size.
    """
    return (
        Parameter(
            "target_size",
            target,
            description=f"what everything may take: {example}, or a budget such as '12GB'",
            remedy=f"Write {example}, or a budget such as '12GB'.",
        ),
        Parameter("algorithm", str, DEFAULT_ALGORITHM, "how the members of a group are merged"),
        Parameter("granularity", choice(*blocks), blocks[0], "what a block is"),
        Parameter("linkage", choice(*LINKAGES), "min", "similarity of two groups"),
        Parameter("order", choice(*ORDERS), "greedy", "which groups are merged first"),
    )
