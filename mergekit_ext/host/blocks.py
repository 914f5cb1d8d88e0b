"""From parameter names to blocks, the parts of a model that are treated as one, in network order.

Names go in and names come out: no tensor, no configuration, no code of the model is needed, so
the same rule serves every architecture that follows the naming habits of transformers. What those
habits are is written in `block_tables`; a new one is a line there. For users: docs/blocks.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from mergekit_ext.host.block_tables import (
    BODY,
    CODER_EMBEDDING,
    COMPONENTS,
    DECODER_BIAS,
    EMBEDDING,
    HEAD_SLOTS,
    INPUT_NORM,
    MODEL_HEAD,
    NESTED_STACKS,
    NORM,
    NORM_SLOTS,
    OUTPUT_EMBEDDING,
    PARTS,
    SHARED_EMBEDDING,
    STACKS,
    TASK_HEAD,
    TOKEN_EMBEDDING,
    Component,
    Kind,
    Slot,
)

Granularity = Literal["component", "layer", "tensor", "model"]
_Natural = tuple[tuple[int, int, str], ...]
# Sorts after every component: what a stage holds beside its layers comes after them.
_END = (2, 0, "")


class Layer(NamedTuple):
    """Where a parameter sits: `stack`.`depth`.`rest` is its name."""

    stack: str
    depth: int
    rest: str


def layer_of(name: str) -> Layer | None:
    """Split a name at its layer; None for a name outside of the layers."""
    parts = name.split(".")
    for at, holder in enumerate(parts[:-2]):
        if parts[at + 1].isdecimal() and STACKS.search(holder):
            while (
                len(parts) > at + 4
                and (parts[at], parts[at + 2]) in NESTED_STACKS
                and parts[at + 3].isdecimal()
            ):
                at += 2
            return Layer(".".join(parts[: at + 1]), int(parts[at + 1]), ".".join(parts[at + 2 :]))
    return None


def depth_of(name: str) -> int | None:
    """Return the index of the layer that `name` is in, within its stack; None outside of layers."""
    layer = layer_of(name)
    return layer.depth if layer else None


def _module_of(name: str) -> str:
    """Return the module that holds parameter `name`; a bare parameter is its own module."""
    return name.rpartition(".")[0] or name


def _is_norm(name: str) -> bool:
    return NORM.search(_module_of(name).rpartition(".")[2]) is not None


def _component_of(layer: Layer) -> Component | None:
    """Return the part of its layer that a name belongs to; None for norms and what is unknown."""
    inner = _module_of(layer.rest)
    parts = () if _is_norm(layer.rest) else COMPONENTS
    return next((part for part in parts if part.pattern.search(inner)), None)


def is_task_head(name: str) -> bool:
    """Whether `name` is of a head that belongs to one task, and so must not be shared.

    Classification, regression, question answering, multiple choice, reward; with what only they
    bring along, such as DistilBERT's `pre_classifier` and Whisper's `projector`. Heads from
    pretraining (language models, `cls.predictions`) are not, and neither are poolers.
    """
    return TASK_HEAD.search(name) is not None


def kind_of(name: str) -> Kind:
    """Return what `name` is; a norm inside of a head is of kind "head"."""
    layer = layer_of(name)
    if layer is not None and (component := _component_of(layer)):
        return component.kind
    if layer is None and (is_task_head(name) or MODEL_HEAD.search(name)):
        return "head"
    if _is_norm(name):
        return "norm"
    return "embedding" if layer is None and EMBEDDING.search(name) else "other"


def _by_component(name: str) -> str:
    layer = layer_of(name)
    component = None if layer is None else _component_of(layer)
    return _module_of(name) if component is None else f"{_by_layer(name)}.{component.name}"


def _by_layer(name: str) -> str:
    layer = layer_of(name)
    return _module_of(name) if layer is None else f"{layer.stack}.{layer.depth}"


GRANULARITIES: Mapping[Granularity, Callable[[str], str]] = {
    "component": _by_component,
    "layer": _by_layer,
    "tensor": lambda name: name,
    "model": lambda name: "model",
}


def block_of(name: str, granularity: Granularity = "component") -> str:
    """Return the block that parameter `name` belongs to.

    >>> block_of("model.layers.3.self_attn.q_proj.weight")
    'model.layers.3.attention'

    "component" (FlexMerge, section 4: attention, MLP and norms are separate blocks): attention,
    cross attention and MLP of a layer are one block each, and so is each norm, under its full
    name. "layer": a whole layer. With both, what is outside of the layers, or has no known name,
    is the module that it sits in. "tensor": every tensor; "model": one block.

    A name alone does not say what it is tied to: `blocks_of` puts tied names together.
    """
    return GRANULARITIES[granularity](name)


def tied_groups(names: Iterable[str], tie_word_embeddings: bool) -> list[set[str]]:
    """Return the sets of `names` that are one tensor under several names.

    Files often hold only one of the names; a set has at least two that are there. Always tied
    are an embedding that encoder and decoder share (T5, BART: `shared`), and an output bias that a
    head and its decoder both name (`cls.predictions.bias`). `tie_word_embeddings`, the setting of
    the model's configuration, ties each output embedding to the input embedding nearest to it: of
    the same submodel, the decoder's. The sets are disjoint, ordered by their first name.
    """
    present = {name for name in names if layer_of(name) is None}
    pairs = [*_shared_embeddings(present), *_output_biases(present)]
    if tie_word_embeddings:
        pairs += [*_coder_embeddings(present), *_output_embeddings(present)]
    return _united(pairs)


def _shared_embeddings(present: set[str]) -> Iterator[tuple[str, str]]:
    for owner in present:
        if not (found := SHARED_EMBEDDING.search(owner)):
            continue
        prefix = owner[: found.start("owner")]
        for name in present - {owner}:
            coder = CODER_EMBEDDING.search(name)
            if coder and name[: coder.start("part")] == prefix:
                yield owner, name


def _coder_embeddings(present: set[str]) -> Iterator[tuple[str, str]]:
    """Encoder and decoder side by side, in a file that does not name what they share."""
    coders = {name: found for name in present if (found := CODER_EMBEDDING.search(name))}
    first_of: dict[str, str] = {}
    for name, found in sorted(coders.items()):
        yield first_of.setdefault(name[: found.start("part")], name), name


def _output_biases(present: set[str]) -> Iterator[tuple[str, str]]:
    for name in present:
        plain = name.removesuffix(".decoder.bias") + ".bias"
        if DECODER_BIAS.search(name) and plain in present:
            yield plain, name


def _output_embeddings(present: set[str]) -> Iterator[tuple[str, str]]:
    inputs = sorted(name for name in present if TOKEN_EMBEDDING.search(name))
    for output in sorted(name for name in present if OUTPUT_EMBEDDING.search(name)):
        if inputs:
            yield max(inputs, key=lambda name: _nearness(name, output)), output


def _nearness(embedding: str, output: str) -> tuple[int, bool]:
    parts = embedding.split(".")
    same = (ours == theirs for ours, theirs in zip(parts, output.split("."), strict=False))
    return sum(takewhile(bool, same)), any(part.endswith("decoder") for part in parts)


def _united(pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    groups: list[set[str]] = []
    for pair in pairs:
        touched = [group for group in groups if not group.isdisjoint(pair)]
        groups = [group for group in groups if group.isdisjoint(pair)]
        groups.append(set(pair).union(*touched))
    return sorted((group for group in groups if len(group) > 1), key=min)


def blocks_of(
    names: Iterable[str], granularity: Granularity, tie_word_embeddings: bool
) -> dict[str, list[str]]:
    """Return the blocks of a model: block -> its tensor names, both in network order.

    Embeddings, then the parts of the model (vision, text, encoder, decoder), in each of them its
    own embeddings, its layers ascending, its final norm; then what follows all layers (final
    norm, pooler), the heads last. In a layer: attention, cross attention, MLP, each norm where
    its name says. Numbers sort as numbers. The order depends on the set of names only.

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


@lru_cache(maxsize=1 << 16)
def _place(name: str) -> tuple[Any, ...]:
    """Return what names are sorted by: zone, part, phase, layer, slot; then name and spelling,
    which decides between "x.1" and "x.01"."""
    layer, part, kind = layer_of(name), _part(name), kind_of(name)
    zone, phase = _Zone.PARTS, _Phase.LAYERS
    path: _Natural = ()
    slot = (0, 0)
    if layer is not None:
        path, slot = (*_natural(f"{layer.stack}.{layer.depth}"), _END), _slot(name, layer)
    elif kind == "head":
        zone = _Zone.TASK_HEAD if is_task_head(name) else _Zone.MODEL_HEAD
        slots = (at for at, pattern in enumerate(HEAD_SLOTS) if pattern.search(name))
        part, phase, slot = None, _Phase.REST, (next(slots, len(HEAD_SLOTS)), 0)
    else:
        phase = _phase(name, kind)
        if part is None:
            zone = _Zone.INPUTS if phase < _Phase.LAYERS else _Zone.OUTPUTS
    inside = BODY if part is None else part
    return zone, inside, phase, path, slot, _natural(name), name


def _natural(text: str) -> _Natural:
    """Digits compare as numbers; "layers.2" comes before "layers.10"."""
    pieces = (piece for piece in re.split(r"(\d+)|\.", text) if piece)
    return tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces)


def _part(name: str) -> int | None:
    """Return the part of the model that the outermost component in `PARTS` names."""
    for component in _module_of(name).split("."):
        for rank, pattern in PARTS:
            if pattern.search(component):
                return rank
    return None


def _phase(name: str, kind: Kind) -> _Phase:
    if kind == "norm":
        early = INPUT_NORM.search(_module_of(name)) is not None
        return _Phase.INPUT_NORMS if early else _Phase.FINAL_NORMS
    return _Phase.EMBEDDINGS if kind == "embedding" else _Phase.REST


def _slot(name: str, layer: Layer) -> tuple[int, int]:
    """Return the place within a layer: T5's numbered part of it, then the `Slot`."""
    numbered = re.match(r"layer\.(\d+)\.", layer.rest)
    part = int(numbered[1]) if numbered else 0
    component = _component_of(layer)
    if component is not None:
        return part, component.slot
    if not _is_norm(name):
        return part, Slot.UNKNOWN
    inner = _module_of(layer.rest)
    found = (slot for slot, pattern in NORM_SLOTS if pattern.search(inner))
    return part, next(found, Slot.BEFORE_ATTENTION)
