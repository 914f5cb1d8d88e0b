"""Which tensors a base and its fine-tunes have in common, from names, shapes and dtypes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch

from mergekit_ext.flexmerge.algorithm import Algorithm
from mergekit_ext.flexmerge.layout import FLOATING, BlockLayout, Layout, Part
from mergekit_ext.flexmerge.residual import Residual, ResidualStorage
from mergekit_ext.flexmerge.storage import Storage, Target
from mergekit_ext.host.blocks import blocks_of, depth_of, is_task_head, kind_of, tied_groups
from mergekit_ext.io.class_model import class_names
from mergekit_ext.io.headers import TensorHeader

Headers = Mapping[str, TensorHeader]
# Stored tensors, and the configuration that says what their class calls them.
Stored = tuple[Headers, Any]


@dataclass(frozen=True)
class Prepared:
    """A FlexMerge that has passed its checks."""

    references: Sequence[Any]  # mergekit's, of the base and of each task's model
    layout: Layout
    algorithm: Algorithm  # whose parameters are all of the merge
    forced: torch.dtype | None  # of all shareable tensors, if one is asked for
    options: Any  # mergekit's
    adapted: frozenset[str] = frozenset()  # tensors that an adapter changes, or brings

    @cached_property
    def storage(self) -> Storage:
        if isinstance(self.algorithm, Residual):
            return ResidualStorage(self.layout, self.algorithm, self.forced)
        return Storage(self.layout, self.algorithm.masks, self.forced)

    @property
    def target(self) -> Target:
        target: Target = self.algorithm.parameters.shared["target_size"]
        return target


def laid_out(
    tasks: Sequence[str], stored: Sequence[Stored], parameters: Mapping[str, Any]
) -> tuple[Layout, list[Headers], tuple[str, str] | None]:
    """Return the blocks and private tensors of a base, which comes first, and of the models.

    And the headers of all by the models' names, and what `find_prefixes` returns of the base.
    `parameters` are those of the merge.
    """
    base, prefixes = _as_in_models(stored[0], stored[1:])
    tied = is_tied([config for _, config in stored])
    owners = complete_ties([base, *(headers for headers, _ in stored[1:])], tied)
    merges_heads = parameters["heads"] == "merged"
    layout = make_layout(tasks, owners, parameters["granularity"], tied, merges_heads)
    return layout, owners, prefixes


def is_tied(configs: Sequence[Any]) -> bool:
    """Return whether all models have one matrix for input and output embeddings."""
    return all(getattr(config, "tie_word_embeddings", False) for config in configs)


def make_layout(
    tasks: Sequence[str],
    owners: Sequence[Headers],
    granularity: Any = "component",
    tied: bool = False,
    merges_heads: bool = False,
) -> Layout:
    """Sort the tensors of a base, which comes first, and of its models into blocks.

    A tensor is merged if the base and every model have it in one shape and a floating dtype, and
    it is not a task's head. Everything else is private to each task that has it.
    """
    merged = [
        name
        for name in owners[1]
        if (merges_heads or not is_task_head(name)) and _shareable(owners, name)
    ]
    blocks = []
    for block, names in blocks_of(merged, granularity, tied).items():
        parts, start = [], 0
        for name in names:
            shape = owners[0][name].shape
            base, *models = (FLOATING[owner[name].dtype] for owner in owners)
            parts.append(Part(name, shape, start, tuple(models), base))
            start += math.prod(shape)
        depth = depth_of(names[0])
        whole = granularity == "model" or (granularity == "layer" and depth is not None)
        kind = granularity if whole else kind_of(names[0])
        blocks.append(BlockLayout(block, kind, depth, tuple(parts)))
    kept = set(merged)
    private = [
        tuple(header for name, header in model.items() if name not in kept) for model in owners[1:]
    ]
    return Layout(tuple(tasks), tuple(blocks), tuple(private))


def complete_ties(owners: Sequence[Headers], tied: bool) -> list[Headers]:
    """Let base and models (in this order) have their tied tensors under the same names.

    Some files hold a tied tensor under one of its names, others under several. A copy that only
    some have would be private to them, and differ from what is merged under the first name:
    loaders no longer tie what differs.
    """
    completed = [dict(owner) for owner in owners]
    for group in tied_groups({name for model in owners[1:] for name in model}, tied):
        names = sorted(group)
        added = []
        for owner in owners:
            found = [owner[name] for name in names if name in owner]
            added.append({name: owner.get(name, found[0]) for name in names} if found else {})
        if all(_shareable(added, name) for name in names):
            for owner, headers in zip(completed, added, strict=True):
                owner.update(headers)
    return list(completed)


def _shareable(owners: Sequence[Headers], name: str) -> bool:
    headers = [owner.get(name) for owner in owners]
    first = headers[0]
    return first is not None and all(
        header is not None and header.shape == first.shape and header.dtype in FLOATING
        for header in headers
    )


def _as_in_models(base: Stored, models: Sequence[Stored]) -> tuple[Headers, tuple[str, str] | None]:
    """Return the base's headers by the models' names, and the change of prefix in them.

    Names are taken as they are stored, or else as the classes call them, whichever gives more
    that all models have. Each header keeps its stored name.
    """
    headers, config = base
    shared = reduce(set.intersection, (set(names) for names, _ in models))
    own = class_names(headers, config).of
    theirs = {name: stored for stored, name in _by_class(models) if stored in shared}
    renamed = {n: n if n in shared else theirs.get(own[n], own[n]) for n in headers}
    ways = [headers]
    if len(set(renamed.values())) == len(renamed):
        ways.append({renamed[name]: header for name, header in headers.items()})
    found = []
    for way in ways:
        prefixes = find_prefixes(way, [names for names, _ in models])
        if prefixes is not None:
            old, new = prefixes
            way = {new + name.removeprefix(old): header for name, header in way.items()}
        found.append((len(shared & way.keys()), way, prefixes))
    _, named, prefixes = max(found, key=lambda item: item[0])
    return named, prefixes


def find_prefixes(
    base: Collection[str], models: Sequence[Collection[str]]
) -> tuple[str, str] | None:
    """Return the prefix that the base's names lose, and the one that they get, one of them "".

    ``ViTModel`` stores ``encoder.layer.0...`` where ``ViTForImageClassification`` has
    ``vit.encoder.layer.0...``; transformers itself loads either into either. With the change more
    than half of the base's names (of the models' common names, where one is lost) are names of
    all models, and more than without it. None if there is no such prefix, or more than one.
    """
    known = set(base)
    shared = reduce(set.intersection, map(set, models)) if models else set()
    alike = len(known & shared)
    added = Counter(prefix for name in shared for prefix, rest in _splits(name) if rest in known)
    taken = Counter(prefix for name in known for prefix, rest in _splits(name) if rest in shared)
    found = [("", prefix) for prefix, n in added.items() if n > max(alike, len(known) / 2)]
    found += [(prefix, "") for prefix, n in taken.items() if n > max(alike, len(shared) / 2)]
    return found[0] if len(found) == 1 else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    for end, letter in enumerate(name, 1):
        if letter == ".":
            yield name[:end], name[end:]


def named_otherwise(models: Sequence[Stored]) -> list[tuple[str, str]]:
    """Return pairs of stored names that the models have for one tensor of their class."""
    first: dict[str, str] = {}
    pairs = []
    for stored, name in _by_class(models):
        if first.setdefault(name, stored) != stored:
            pairs.append((first[name], stored))
    return list(dict.fromkeys(pairs))


def _by_class(models: Sequence[Stored]) -> list[tuple[str, str]]:
    return [pair for headers, config in models for pair in class_names(headers, config).of.items()]
