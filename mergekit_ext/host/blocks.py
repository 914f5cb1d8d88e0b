"""From parameter names to blocks, the parts of a model that are treated as one, in network order.

The naming habits of transformers are in `block_tables`; a new one is a line there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from mergekit_ext.host import block_tables as tables
from mergekit_ext.host.block_tables import Component, Kind, Slot

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
        if parts[at + 1].isdecimal() and tables.STACKS.search(holder):
            while (
                len(parts) > at + 4
                and (parts[at], parts[at + 2]) in tables.NESTED_STACKS
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
    return tables.NORM.search(_module_of(name).rpartition(".")[2]) is not None


def _component_of(layer: Layer) -> Component | None:
    """Return the part of its layer that a name belongs to; None for norms and what is unknown."""
    inner = _module_of(layer.rest)
    parts = () if _is_norm(layer.rest) else tables.COMPONENTS
    return next((part for part in parts if part.pattern.search(inner)), None)


def is_task_head(name: str) -> bool:
    """Return whether `name` is of a head that belongs to one task, and so must not be shared.

    Heads from pretraining (language models, `cls.predictions`) are not, and neither are poolers.
    """
    return tables.TASK_HEAD.search(name) is not None


def is_router(name: str) -> bool:
    """Return whether `name` is of what sends tokens to experts, in a layer that has experts."""
    layer = layer_of(name)
    return layer is not None and tables.ROUTER.search(_module_of(layer.rest)) is not None


def stacks_experts(name: str, axes: int) -> bool:
    """Return whether the first axis of a tensor with so many `axes` counts experts."""
    one = 1 if name.endswith("bias") else 2
    return tables.EXPERTS.search(name) is not None and axes == one + 1


def kind_of(name: str) -> Kind:
    """Return what `name` is; a norm inside of a head is of kind "head"."""
    layer = layer_of(name)
    if layer is not None and (component := _component_of(layer)):
        return component.kind
    if layer is None and (is_task_head(name) or tables.MODEL_HEAD.search(name)):
        return "head"
    if _is_norm(name):
        return "norm"
    return "embedding" if layer is None and tables.EMBEDDING.search(name) else "other"


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
    """Return the block that parameter `name` belongs to, whatever it is tied to.

    >>> block_of("model.layers.3.self_attn.q_proj.weight")
    'model.layers.3.attention'

    Of "component" (FlexMerge, section 4) and "layer", what is outside of the layers, or has no
    known name, is in the block of its module.
    """
    return GRANULARITIES[granularity](name)


def tied_groups(names: Iterable[str], tie_word_embeddings: bool) -> list[set[str]]:
    """Return the sets of `names` that are one tensor under several names, by their first name.

    Always tied are an embedding that encoder and decoder share, and an output bias that a head and
    its decoder both name. `tie_word_embeddings`, of the model's configuration, ties each output
    embedding to the input embedding nearest to it: of the same submodel, the decoder's.
    """
    present = {name for name in names if layer_of(name) is None}
    pairs = [*_embeddings_of_coders(present, tie_word_embeddings), *_output_biases(present)]
    return _united([*pairs, *(_output_embeddings(present) if tie_word_embeddings else ())])


def _embeddings_of_coders(present: set[str], tied: bool) -> Iterator[tuple[str, str]]:
    """Yield what encoder and decoder share; where the file does not name it, only if `tied`."""
    shared = [(name, tables.SHARED_EMBEDDING.search(name)) for name in sorted(present)]
    owners = {name[: found.start("owner")]: name for name, found in shared if found}
    first_of: dict[str, str] = {}
    for name in sorted(present):
        if found := tables.CODER_EMBEDDING.search(name):
            prefix = name[: found.start("part")]
            if prefix in owners:
                yield owners[prefix], name
            elif tied:
                yield first_of.setdefault(prefix, name), name


def _output_biases(present: set[str]) -> Iterator[tuple[str, str]]:
    for name in present:
        plain = name.removesuffix(".decoder.bias") + ".bias"
        if tables.DECODER_BIAS.search(name) and plain in present:
            yield plain, name


def _output_embeddings(present: set[str]) -> Iterator[tuple[str, str]]:
    inputs = sorted(name for name in present if tables.TOKEN_EMBEDDING.search(name))
    for output in sorted(name for name in present if tables.OUTPUT_EMBEDDING.search(name)):
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

    The order depends on the set of names only (`_place`). Names that are tied lie next to each
    other in the block of the first of them, which is the input embedding where there is one.
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
    """Return zone, part, phase, layer, slot, name and spelling, by which names are sorted."""
    layer, part, kind = layer_of(name), _part(name), kind_of(name)
    zone, phase = _Zone.PARTS, _Phase.LAYERS
    path: _Natural = ()
    slot = (0, 0)
    if layer is not None:
        path, slot = (*_natural(f"{layer.stack}.{layer.depth}"), _END), _slot(name, layer)
    elif kind == "head":
        zone = _Zone.TASK_HEAD if is_task_head(name) else _Zone.MODEL_HEAD
        slots = (at for at, pattern in enumerate(tables.HEAD_SLOTS) if pattern.search(name))
        part, phase, slot = None, _Phase.REST, (next(slots, len(tables.HEAD_SLOTS)), 0)
    else:
        phase = _phase(name, kind)
        if part is None:
            zone = _Zone.INPUTS if phase < _Phase.LAYERS else _Zone.OUTPUTS
    inside = tables.BODY if part is None else part
    return zone, inside, phase, path, slot, _natural(name), name


def _natural(text: str) -> _Natural:
    """Digits compare as numbers; "layers.2" comes before "layers.10"."""
    pieces = (piece for piece in re.split(r"(\d+)|\.", text) if piece)
    return tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces)


def _part(name: str) -> int | None:
    """Return the part of the model that the outermost component in `PARTS` names."""
    for component in _module_of(name).split("."):
        for rank, pattern in tables.PARTS:
            if pattern.search(component):
                return rank
    return None


def _phase(name: str, kind: Kind) -> _Phase:
    if kind == "norm":
        early = tables.INPUT_NORM.search(_module_of(name)) is not None
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
    found = (slot for slot, pattern in tables.NORM_SLOTS.items() if pattern.search(inner))
    return part, next(found, Slot.BEFORE_ATTENTION)
