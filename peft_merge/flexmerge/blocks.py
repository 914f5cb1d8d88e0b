"""Blocks: the modules that are merged, or kept apart, together."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from peft_merge.io import names


@dataclass(frozen=True)
class Block:
    """Modules whose groups of tasks are the same."""

    name: str
    modules: tuple[str, ...]


def _layer(module: str, adapted: Collection[str]) -> str:
    owner = names.owner(module, adapted)
    match = names.LAYER.search(owner)
    return owner[: match.end(1)] if match else owner


# PEFT configures some modules together (both projections of torch's attention, the target
# parameters of one module): they have one rank, so they are never apart.
GRANULARITIES: dict[str, Callable[[str, Collection[str]], str]] = {
    "module": names.owner,
    "layer": _layer,
}


def blocks_of(modules: Collection[str], granularity: str) -> tuple[Block, ...]:
    """The blocks in natural order of their names (`layers.2` before `layers.10`).

    Args:
        modules: of all adapters.
        granularity: `module`, each by itself; or `layer`, up to the first number in the name
            (``model.layers.3``); modules outside of layers by themselves.
    """
    key = GRANULARITIES[granularity]
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(key(module, modules), []).append(module)
    return tuple(
        Block(name, tuple(sorted(found[name], key=_natural)))
        for name in sorted(found, key=_natural)
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]
