"""The base's tensors under the names that the models have for them.

A base may be bare, without the prefix of its fine-tunes, and saved by another version of
transformers, which called tensors otherwise (``LayerNorm.gamma``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from mergekit_ext.flexmerge.prefix import Renaming, find_renaming, named_as
from mergekit_ext.host.class_model import class_names
from mergekit_ext.io.headers import TensorHeader

Headers = Mapping[str, TensorHeader]
# Stored tensors, and the configuration that says what their class calls them.
Stored = tuple[Headers, Any]


def as_in_models(base: Stored, models: Sequence[Stored]) -> tuple[Headers, Renaming | None]:
    """Return the base's headers by the models' names, and the change of prefix in it.

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
        renaming = find_renaming(way, [names for names, _ in models])
        named = named_as(way, renaming)
        found.append((len(shared & named.keys()), named, renaming))
    _, named, renaming = max(found, key=lambda item: item[0])
    return named, renaming


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
