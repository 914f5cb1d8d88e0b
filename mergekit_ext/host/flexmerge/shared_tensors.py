"""Which tensors a base and its fine-tunes have in common, from names, shapes and dtypes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mergekit_ext.core.parameters import Values
from mergekit_ext.flexmerge.algorithm import Algorithm
from mergekit_ext.flexmerge.layout import FLOATING, BlockLayout, Layout, Part
from mergekit_ext.flexmerge.residual import Residual, ResidualStorage
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.host.blocks import blocks_of, depth_of, is_task_head, kind_of, tied_groups
from mergekit_ext.host.checks.copied import OTHERS, is_merged
from mergekit_ext.host.naming import Headers, Stored, as_in, complete_ties, is_tied, shareable

if TYPE_CHECKING:
    from mergekit_ext.host.flexmerge.adapters import Forms


@dataclass(frozen=True)
class Prepared:
    """A FlexMerge that has passed its checks."""

    references: Sequence[Any]  # mergekit's, of the base and of each task's model
    layout: Layout
    algorithm: Algorithm  # whose parameters are all of the merge
    forced: torch.dtype | None  # of all shareable tensors, if one is asked for
    options: Any  # mergekit's
    adapted: frozenset[str] = frozenset()  # tensors that an adapter changes, or brings
    forms: "Forms | None" = None  # of the adapters that are written, if there are any

    @cached_property
    def storage(self) -> Storage:
        if isinstance(self.algorithm, Residual):
            forms, given = self.forms, (self.layout, self.algorithm, self.forced)
            own = (forms.treatments, forms.counts, forms.held, forms.private_bytes) if forms else ()
            return ResidualStorage(*given, *own)
        return Storage(self.layout, self.algorithm.masks, self.forced)

    @property
    def target(self) -> Target:
        return self.algorithm.parameters.shared["target_size"]


def laid_out(
    tasks: Sequence[str], references: Sequence[Any], stored: Sequence[Stored], parameters: Values
) -> tuple[Layout, list[Headers], tuple[str, str] | None]:
    """Return the blocks and private tensors of a base, which comes first, and of the models.

    And the headers of all by the models' names, and what `find_prefixes` returns of the base.

    A tensor is merged if the base and every model have it in one shape and a floating dtype, it is
    not a task's head that is private, and the `parameters` of the merge select it: of tensors that
    are tied all, or none. One that is not selected is that of `others` in all tasks, if it has the
    shape that they have. Everything else is private to each task that has it.
    """
    base, prefixes = as_in(stored[0], stored[1:])
    tied = is_tied([config for _, config in stored])
    owners = complete_ties([base, *(headers for headers, _ in stored[1:])], tied)
    names = {name for owner in owners for name in owner}
    heads = {n for n in names if is_task_head(n)} if parameters["heads"] == "private" else set()
    left = {name for name in names - heads if not is_merged(name, parameters)}
    left.update(*(group for group in tied_groups(names, tied) if group & left))
    others = parameters.get(OTHERS, str(references[0]))
    giver = [str(reference) for reference in references].index(others)
    apart = heads | left
    merged = [name for name in owners[1] if name not in apart and shareable(owners, name)]
    given = [
        replace(header, name=name)
        for name, header in owners[giver].items()
        if name in left
        and all(name in owner and owner[name].shape == header.shape for owner in owners[1:])
    ]
    blocks, granularity = [], parameters["granularity"]
    for block, inside in blocks_of(merged, granularity, tied).items():
        parts, start = [], 0
        for name in inside:
            shape = owners[0][name].shape
            base, *models = (FLOATING[owner[name].dtype] for owner in owners)
            parts.append(Part(name, shape, start, tuple(models), base))
            start += math.prod(shape)
        depth = depth_of(inside[0])
        whole = granularity == "model" or (granularity == "layer" and depth is not None)
        kind = granularity if whole else kind_of(inside[0])
        blocks.append(BlockLayout(block, kind, depth, tuple(parts)))
    kept = {*merged, *(header.name for header in given)}
    private = [tuple(h for n, h in model.items() if n not in kept) for model in owners[1:]]
    layout = Layout(tuple(tasks), tuple(blocks), tuple(private), tuple(given), giver - 1)
    return layout, owners, prefixes
