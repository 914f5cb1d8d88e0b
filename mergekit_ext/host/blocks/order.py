"""Network order: the order in which data meets the tensors, as far as names say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from mergekit_ext.host.blocks.names import (
    Granularity,
    Layer,
    block_of,
    component_of,
    is_norm,
    is_task_head,
    kind_of,
    layer_of,
    module_of,
    tied_groups,
)
from mergekit_ext.host.blocks.tables import (
    BODY,
    HEAD_SLOTS,
    INPUT_NORM,
    NORM_SLOTS,
    PARTS,
    Kind,
    Slot,
)

_Natural = tuple[tuple[int, int, str], ...]
# Sorts after every component: what a stage holds beside its layers comes after them.
_END = (2, 0, "")


class _Zone(IntEnum):
    INPUTS = 0
    PARTS = 1
    OUTPUTS = 2
    MODEL_HEAD = 3
    TASK_HEAD = 4


class _Phase(IntEnum):
    EMBEDDINGS = 0
    INPUT_NORMS = 1
    LAYERS = 2
    FINAL_NORMS = 3
    REST = 4


class _Place(NamedTuple):
    """What names are sorted by."""

    zone: _Zone
    part: int
    phase: _Phase
    layer: _Natural
    slot: tuple[int, int]
    name: _Natural
    spelling: str  # Decides between "x.1" and "x.01".


def order_of(names: Iterable[str]) -> list[str]:
    """Return `names`, without repetitions, in network order.

    Embeddings, then the parts of the model (vision, text, encoder, decoder), in each of them its
    own embeddings, its layers ascending, its final norm; then what follows all layers (final
    norm, pooler), the heads last. In a layer: attention, cross attention, MLP, each norm where
    its name says. Numbers sort as numbers. The order depends on the set of names only.

    >>> order_of(["model.norm.weight", "model.layers.10.mlp.up_proj.weight",
    ...           "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])[:2]
    ['model.embed_tokens.weight', 'model.layers.2.mlp.up_proj.weight']
    """
    return sorted(set(names), key=_place)


def blocks_of(
    names: Iterable[str], granularity: Granularity, tie_word_embeddings: bool
) -> dict[str, list[str]]:
    """Return the blocks of a model: block -> its tensor names, both in network order.

    Names that are tied (see `tied_groups`) lie in one block, next to each other: that of the
    first of them in network order, which is the input embedding where there is one.
    """
    wanted = set(names)
    leader = {name: name for name in wanted}
    for group in tied_groups(wanted, tie_word_embeddings):
        leader.update(dict.fromkeys(group, min(group, key=_place)))
    blocks: dict[str, list[str]] = {}
    for name in sorted(wanted, key=lambda name: (_place(leader[name]), _place(name))):
        blocks.setdefault(block_of(leader[name], granularity), []).append(name)
    return blocks


def _natural(text: str) -> _Natural:
    """Digits compare as numbers; "layers.2" comes before "layers.10"."""
    pieces = (piece for piece in re.split(r"(\d+)|\.", text) if piece)
    return tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces)


@lru_cache(maxsize=1 << 16)
def _place(name: str) -> _Place:
    layer, part = layer_of(name), _part(name)
    if layer is not None:
        path = (*_natural(f"{layer.stack}.{layer.depth}"), _END)
        inside = BODY if part is None else part
        return _Place(
            _Zone.PARTS, inside, _Phase.LAYERS, path, _slot(name, layer), _natural(name), name
        )
    kind = kind_of(name)
    if kind == "head":
        zone = _Zone.TASK_HEAD if is_task_head(name) else _Zone.MODEL_HEAD
        slots = (at for at, pattern in enumerate(HEAD_SLOTS) if pattern.search(name))
        slot = next(slots, len(HEAD_SLOTS))
        return _Place(zone, BODY, _Phase.REST, (), (slot, 0), _natural(name), name)
    phase = _phase(name, kind)
    if part is None:
        zone = _Zone.INPUTS if phase < _Phase.LAYERS else _Zone.OUTPUTS
        return _Place(zone, BODY, phase, (), (0, 0), _natural(name), name)
    return _Place(_Zone.PARTS, part, phase, (), (0, 0), _natural(name), name)


def _part(name: str) -> int | None:
    """The part of the model that the outermost telling component names."""
    for component in module_of(name).split("."):
        for rank, pattern in PARTS:
            if pattern.search(component):
                return rank
    return None


def _phase(name: str, kind: Kind) -> _Phase:
    if kind == "norm":
        early = INPUT_NORM.search(module_of(name)) is not None
        return _Phase.INPUT_NORMS if early else _Phase.FINAL_NORMS
    return _Phase.EMBEDDINGS if kind == "embedding" else _Phase.REST


def _slot(name: str, layer: Layer) -> tuple[int, int]:
    """The place within a layer: T5's numbered part of it, then the `Slot`."""
    numbered = re.match(r"layer\.(\d+)\.", layer.rest)
    part = int(numbered[1]) if numbered else 0
    component = component_of(name)
    if component is not None:
        return part, component.slot
    if not is_norm(name):
        return part, Slot.UNKNOWN
    inner = module_of(layer.rest)
    found = (slot for slot, pattern in NORM_SLOTS if pattern.search(inner))
    return part, next(found, Slot.BEFORE_ATTENTION)
