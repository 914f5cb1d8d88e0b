"""From parameter names to blocks: the parts of a model that are treated as one.

Names go in and names come out: no tensor, no configuration, no code of the model is needed, so
the same rule serves every architecture that follows the naming habits of transformers. What those
habits are is written in `tables`; a new one is a line there. The rule, for users: docs/blocks.md.
"""

from mergekit_ext.host.blocks.names import (
    GRANULARITIES,
    Granularity,
    Layer,
    block_of,
    depth_of,
    is_task_head,
    kind_of,
    layer_of,
    stack_of,
)
from mergekit_ext.host.blocks.order import blocks_of, order_of
from mergekit_ext.host.blocks.tables import Kind
from mergekit_ext.host.blocks.ties import tied_groups

__all__ = [
    "GRANULARITIES",
    "Granularity",
    "Kind",
    "Layer",
    "block_of",
    "blocks_of",
    "depth_of",
    "is_task_head",
    "kind_of",
    "layer_of",
    "order_of",
    "stack_of",
    "tied_groups",
]
