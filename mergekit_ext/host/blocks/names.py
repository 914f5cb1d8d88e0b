"""What the names of parameters say: layer, kind, block, and which are one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from mergekit_ext.host.blocks.tables import (
    CODER_EMBEDDING,
    COMPONENTS,
    DECODER_BIAS,
    EMBEDDING,
    MODEL_HEAD,
    NESTED_STACKS,
    NORM,
    OUTPUT_EMBEDDING,
    SHARED_EMBEDDING,
    STACKS,
    TASK_HEAD,
    TOKEN_EMBEDDING,
    Component,
    Kind,
)

Granularity = Literal["component", "layer", "tensor", "model"]


class Layer(NamedTuple):
    """Where a parameter sits: `stack`.`depth`.`rest` is its name."""

    stack: str
    depth: int
    rest: str


def layer_of(name: str) -> Layer | None:
    """Split a name at its layer; None for a name outside of the layers.

    >>> layer_of("decoder.block.1.layer.0.SelfAttention.q.weight")
    Layer(stack='decoder.block', depth=1, rest='layer.0.SelfAttention.q.weight')
    """
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


def stack_of(name: str) -> str | None:
    """Return the stack of layers that `name` is in ("model.layers"), None outside of layers."""
    layer = layer_of(name)
    return layer.stack if layer else None


def depth_of(name: str) -> int | None:
    """Return the index of the layer that `name` is in, within its stack; None outside of layers."""
    layer = layer_of(name)
    return layer.depth if layer else None


def module_of(name: str) -> str:
    """Return the module that holds parameter `name`; a bare parameter is its own module."""
    return name.rpartition(".")[0] or name


def is_norm(name: str) -> bool:
    """Whether the module that holds the parameter is a norm ("norm.mlp.fc" is not)."""
    return NORM.search(module_of(name).rpartition(".")[2]) is not None


def component_of(name: str) -> Component | None:
    """Return the part of its layer that `name` belongs to; None for norms and what is unknown."""
    layer = layer_of(name)
    if layer is None or is_norm(layer.rest):
        return None
    inner = module_of(layer.rest)
    return next((part for part in COMPONENTS if part.pattern.search(inner)), None)


def is_task_head(name: str) -> bool:
    """Whether `name` is of a head that belongs to one task, and so must not be shared.

    Classification, regression, question answering, multiple choice, reward; with what only they
    bring along, such as DistilBERT's `pre_classifier` and Whisper's `projector`. Heads from
    pretraining (language models, `cls.predictions`, `cls.seq_relationship`) are not, and neither
    are poolers: with most models they belong to the base.

    >>> is_task_head("classifier.out_proj.weight"), is_task_head("lm_head.weight")
    (True, False)
    """
    return TASK_HEAD.search(name) is not None


def kind_of(name: str) -> Kind:
    """Return what `name` is: embedding, attention, cross_attention, mlp, norm, head or other.

    The norm inside of a head is of kind "head".

    >>> kind_of("model.layers.0.self_attn.q_norm.weight"), kind_of("transformer.wte.weight")
    ('norm', 'embedding')
    """
    if layer_of(name) is not None:
        component = component_of(name)
        inside: Kind = "norm" if is_norm(name) else "other"
        return component.kind if component else inside
    outside: tuple[tuple[Kind, bool], ...] = (
        ("head", is_task_head(name) or MODEL_HEAD.search(name) is not None),
        ("norm", is_norm(name)),
        ("embedding", EMBEDDING.search(name) is not None),
    )
    return next((kind for kind, found in outside if found), "other")


def _by_component(name: str) -> str:
    layer, component = layer_of(name), component_of(name)
    if layer is None or component is None:
        return module_of(name)
    return f"{layer.stack}.{layer.depth}.{component.name}"


def _by_layer(name: str) -> str:
    layer = layer_of(name)
    return module_of(name) if layer is None else f"{layer.stack}.{layer.depth}"


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
    >>> block_of("bert.encoder.layer.0.attention.output.LayerNorm.bias")
    'bert.encoder.layer.0.attention.output.LayerNorm'
    >>> block_of("model.layers.3.self_attn.q_proj.weight", "layer")
    'model.layers.3'
    >>> block_of("model.embed_tokens.weight", "layer")
    'model.embed_tokens'

    "component" (FlexMerge, section 4: attention, MLP and norms are separate blocks): attention,
    cross attention and MLP of a layer are one block each, and so is each norm, under its full
    name. "layer": a whole layer. With both, what is outside of the layers, or has no known name,
    is the module that it sits in. "tensor": every tensor; "model": one block.

    A name alone does not say what it is tied to: `blocks_of` puts tied names together.

    Raises:
        ValueError: `granularity` is none of these.
    """
    rule = GRANULARITIES.get(granularity)
    if rule is None:
        known = ", ".join(get_args(Granularity))
        raise ValueError(f"granularity: found {granularity!r}; expected one of {known}")
    return rule(name)


def tied_groups(names: Iterable[str], tie_word_embeddings: bool) -> list[set[str]]:
    """Return the sets of `names` that are one tensor under several names.

    Files often hold only one of the names; a set has at least two that are there. Always tied
    are an embedding that encoder and decoder share (T5, BART: `shared`), and an output bias that a
    head and its decoder both name (`cls.predictions.bias`). `tie_word_embeddings`, the setting of
    the model's configuration, ties each output embedding to the input embedding nearest to it: of
    the same submodel, the decoder's.

    The sets are disjoint, ordered by their first name.

    >>> tied_groups(["transformer.wte.weight", "lm_head.weight"], True) == [
    ...     {"lm_head.weight", "transformer.wte.weight"}]
    True
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
    ours, theirs = embedding.split("."), output.split(".")
    common = 0
    while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
        common += 1
    return common, any(part.endswith("decoder") for part in ours)


def _united(pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    groups: list[set[str]] = []
    for pair in pairs:
        touched = [group for group in groups if not group.isdisjoint(pair)]
        groups = [group for group in groups if group.isdisjoint(pair)]
        groups.append(set(pair).union(*touched))
    return sorted((group for group in groups if len(group) > 1), key=min)
