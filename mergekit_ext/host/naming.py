"""One name for one tensor: what models of a merge call it, from names, shapes and dtypes alone."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.host.blocks import tied_groups
from mergekit_ext.io.class_model import class_names
from mergekit_ext.io.headers import TensorHeader

Headers = Mapping[str, TensorHeader]
# Stored tensors, and the configuration that says what their class calls them.
Stored = tuple[Headers, Any]


def is_tied(configs: Sequence[Any]) -> bool:
    """Return whether all models have one matrix for input and output embeddings."""
    return all(getattr(config, "tie_word_embeddings", False) for config in configs)


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
        if all(shareable(added, name) for name in names):
            for owner, headers in zip(completed, added, strict=True):
                owner.update(headers)
    return list(completed)


def shareable(owners: Sequence[Headers], name: str) -> bool:
    headers = [owner.get(name) for owner in owners]
    first = headers[0]
    return first is not None and all(
        header is not None and header.shape == first.shape and header.dtype in FLOATING
        for header in headers
    )


def as_in(base: Stored, models: Sequence[Stored]) -> tuple[Headers, tuple[str, str] | None]:
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
