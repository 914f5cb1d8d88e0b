"""A base whose tensors have other names: saved bare, without the prefix of its fine-tunes.

``ViTModel`` and ``BertModel`` store ``encoder.layer.0...`` where ``ViTForImageClassification`` has
``vit.encoder.layer.0...``. Many bases on the Hub are bare, and transformers itself loads either
into either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from mergekit_ext.io.headers import TensorHeader


@dataclass(frozen=True)
class Renaming:
    """How the base's names become those of the models: a prefix is added, or taken away."""

    prefix: str
    adds: bool

    def apply(self, name: str) -> str:
        """The name that the models have for a tensor of the base."""
        return f"{self.prefix}.{name}" if self.adds else name.removeprefix(f"{self.prefix}.")

    def __str__(self) -> str:
        if self.adds:
            return f"the base is a bare model: its tensors are read as `{self.prefix}.<name>`"
        return f"the models are bare: the base's tensors are read without `{self.prefix}.`"


def find_renaming(base: Collection[str], models: Sequence[Collection[str]]) -> Renaming | None:
    """The one prefix with which most of the names agree that do not agree as they are.

    With the prefix, more than half of the base's names (of the models' common names, where it is
    taken away) are names of all models, and more than without it. None if there is no such
    prefix, or more than one.
    """
    known = set(base)
    shared = reduce(set.intersection, map(set, models)) if models else set()
    alike = len(known & shared)
    added = Counter(prefix for name in shared for prefix, rest in _splits(name) if rest in known)
    taken = Counter(prefix for name in known for prefix, rest in _splits(name) if rest in shared)
    found = [Renaming(p, True) for p, n in added.items() if n > max(alike, len(known) / 2)]
    found += [Renaming(p, False) for p, n in taken.items() if n > max(alike, len(shared) / 2)]
    return found[0] if len(found) == 1 else None


def named_as(
    base: Mapping[str, TensorHeader], renaming: Renaming | None
) -> Mapping[str, TensorHeader]:
    """The base's headers under the names that the models have; each keeps its stored name."""
    if renaming is None:
        return base
    return {renaming.apply(name): header for name, header in base.items()}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end]), ".".join(parts[end:])
